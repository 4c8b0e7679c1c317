/* The first process of the emulated machine. Runs the program of /command (one argument a line) with the variables of
 * /environment (NAME=value lines), sends its output to Bochs' debug port, then its exit status, and powers off.
 *
 * The program runs under SCHED_FIFO: the kernel does not switch tile registers between threads, and a FIFO thread keeps
 * the only CPU until it waits, which no thread does while it holds tiles. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { kDebugPort = 0xE9, kPowerPort = 0x8900, kMaxArguments = 64 };

static void emit(const char *text, size_t size) {
  for (size_t i = 0; i < size; i++) outb((unsigned char)text[i], kDebugPort);
}

static void say(const char *text) { emit(text, strlen(text)); }

static char *read_file(const char *path) {
  static char buffers[2][1 << 16];
  static int used;
  char *buffer = buffers[used++ % 2];
  FILE *file = fopen(path, "r");
  size_t size = file ? fread(buffer, 1, sizeof buffers[0] - 1, file) : 0;
  buffer[size] = 0;
  if (file) fclose(file);
  return buffer;
}

static void run_command(int output) {
  char *arguments[kMaxArguments] = {0};
  int count = 0;
  for (char *line = strtok(read_file("/environment"), "\n"); line; line = strtok(0, "\n")) putenv(line);
  for (char *line = strtok(read_file("/command"), "\n"); line && count < kMaxArguments - 1; line = strtok(0, "\n")) {
    arguments[count++] = line;
  }
  dup2(output, 1);
  dup2(output, 2);
  struct sched_param priority = {.sched_priority = 1};
  if (sched_setscheduler(0, SCHED_FIFO, &priority)) perror("sched_setscheduler");
  if (count > 0) execv(arguments[0], arguments);
  perror("exec");
  _exit(127);
}

int main(void) {
  mkdir("/proc", 0755);
  mkdir("/tmp", 01777);
  mount("proc", "/proc", "proc", 0, 0);
  mount("tmpfs", "/tmp", "tmpfs", 0, 0);
  if (iopl(3)) return 1;
  say("\n@@begin\n");
  int channel[2], status = 0;
  if (pipe(channel)) return 1;
  pid_t child = fork();
  if (child == 0) {
    close(channel[0]);
    run_command(channel[1]);
  }
  close(channel[1]);
  char chunk[4096];
  for (ssize_t size; (size = read(channel[0], chunk, sizeof chunk)) > 0;) emit(chunk, (size_t)size);
  waitpid(child, &status, 0);
  snprintf(chunk, sizeof chunk, "\n@@end %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  say(chunk);
  for (const char *letter = "Shutdown"; *letter; letter++) outb((unsigned char)*letter, kPowerPort);
  for (;;) pause();
}
