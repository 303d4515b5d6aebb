"""The Program level and what decides it: groups, layouts, the memory plan."""
