/* The least that a supervisor can do: spawn, wait, spawn. */
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;

int main(int argc, char **argv) {
  for (;;) {
    pid_t pid;
    int status;
    if (argc != 2 || posix_spawn(&pid, argv[1], 0, 0, argv + 1, environ)) return 1;
    waitpid(pid, &status, 0);
  }
}
