#include "net/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "net/descriptor.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

#define LINE 3 /* the child's descriptor of its line to the parent */

/* Puts the child's end of the line where the program looks for it, and the report out of its way. */
static bool hand_over(int line, int *report) {
  if (*report == LINE) *report = fcntl(*report, F_DUPFD, LINE + 1);
  if (*report < 0 || fcntl(*report, F_SETFD, FD_CLOEXEC) != 0) return false;
  if (line == LINE) return fcntl(line, F_SETFD, 0) == 0;
  return dup2(line, LINE) == LINE;
}

/* Only what is safe between fork and exec: threads of this process may have held any lock. */
static void become(char *const argv[], pid_t parent, int line, int report) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
#ifdef __linux__
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(127);
#else
  (void)parent;
#endif
  if (line < 0 || hand_over(line, &report)) execvp(argv[0], argv);
  int why = errno;
  ssize_t written = write(report, &why, sizeof why);
  (void)written;
  _exit(127);
}

/* The errno of a child that could not become its program; 0: it did. */
static int heard(int fd) {
  struct pollfd end = {fd, POLLIN, 0};
  int why = 0;
  while (poll(&end, 1, -1) < 0 && errno == EINTR) continue;
  ssize_t got = read(fd, &why, sizeof why);
  return got == (ssize_t)sizeof why ? why : 0;
}

static void close_both(const int ends[2]) {
  if (ends[0] >= 0) close(ends[0]);
  if (ends[1] >= 0) close(ends[1]);
}

static pid_t spawn(char *const argv[], int line) {
  int ends[2], why, status;
  pid_t parent = getpid(), pid;
  if (!mrn_pipe(ends)) return -1;
  pid = fork();
  if (pid == 0) become(argv, parent, line, ends[1]);
  why = errno;
  close(ends[1]);
  if (pid > 0) {
    why = heard(ends[0]);
    if (why != 0) {
      waitpid(pid, &status, 0);
      pid = -1;
    }
  }
  close(ends[0]);
  errno = why;
  return pid;
}

pid_t mrn_spawn(char *const argv[], int *line) {
  int ends[2] = {-1, -1};
  if (line == NULL) return spawn(argv, -1);
  pid_t pid = -1;
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0 && mrn_set_flags(ends[0]) &&
      fcntl(ends[1], F_SETFD, FD_CLOEXEC) == 0) {
    pid = spawn(argv, ends[1]);
  }
  int why = errno;
  if (pid > 0) {
    *line = ends[0];
    ends[0] = -1;
  }
  close_both(ends);
  errno = why;
  return pid;
}

int mrn_parent(void) {
  struct sockaddr_storage own = {.ss_family = AF_UNSPEC};
  socklen_t length = sizeof own;
  if (getsockname(LINE, (struct sockaddr *)&own, &length) != 0) return -1;
  if (own.ss_family == AF_UNIX && mrn_set_flags(LINE)) return LINE;
  errno = ENOTSOCK;
  return -1;
}

int mrn_wait(pid_t pid, int *status) {
  pid_t ended = waitpid(pid, status, WNOHANG);
  return ended > 0 ? 1 : (int)ended;
}

bool mrn_datagram(const char *path, const char *bytes, size_t length) {
  struct sockaddr_un address;
  size_t size = strlen(path);
  if (size == 0 || size >= sizeof address.sun_path) {
    errno = size == 0 ? EINVAL : ENAMETOOLONG;
    return false;
  }
  memset(&address, 0, sizeof address);
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, path, size);
  if (path[0] == '@') address.sun_path[0] = '\0';
  int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (fd < 0) return false;
  mrn_set_flags(fd);
  socklen_t taken = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size + (path[0] != '@'));
  ssize_t sent = sendto(fd, bytes, length, MSG_NOSIGNAL, (struct sockaddr *)&address, taken);
  int why = errno;
  close(fd);
  errno = why;
  return sent == (ssize_t)length;
}
