/* Runs a command and writes the peak of its resident memory, in bytes, to a file.
 *
 *     maxrss FILE COMMAND [ARGUMENT...]
 *
 * A small program in between, because a process's peak counts what it was forked from: started from
 * a big Python, everything would seem as big as that. Its exit status is the command's. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    const pid_t child = fork();
    if (child < 0) return 2;
    if (child == 0) {
        execvp(argv[2], argv + 2);
        perror(argv[2]);
        _exit(127);
    }
    int status;
    struct rusage usage;
    if (wait4(child, &status, 0, &usage) != child) return 2;
    FILE *const file = fopen(argv[1], "w");
    if (!file) return 2;
    fprintf(file, "%lld\n", 1024LL * usage.ru_maxrss);
    if (fclose(file)) return 2;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
