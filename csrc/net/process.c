#include "net/process.h"

#include <errno.h>
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

/* Only what is safe between fork and exec: threads of this process may have held any lock. */
static void become(char *const argv[], pid_t parent, int report) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
#ifdef __linux__
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(127);
#else
  (void)parent;
#endif
  execvp(argv[0], argv);
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

pid_t mrn_spawn(char *const argv[]) {
  int ends[2], why, status;
  pid_t parent = getpid(), pid;
  if (!mrn_pipe(ends)) return -1;
  pid = fork();
  if (pid == 0) become(argv, parent, ends[1]);
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
