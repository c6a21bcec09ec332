#include "net/descriptor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

bool mrn_set_flags(int fd) {
  int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 &&
         fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

static void no_sigpipe(int fd) {
#ifdef SO_NOSIGPIPE
  int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#else
  (void)fd; /* send() is given MSG_NOSIGNAL instead */
#endif
}

int mrn_socket(int family) {
#if defined(SOCK_NONBLOCK) && defined(SOCK_CLOEXEC)
  int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
#else
  int fd = socket(family, SOCK_STREAM, 0);
  if (fd >= 0 && !mrn_set_flags(fd)) {
    close(fd);
    return -1;
  }
#endif
  if (fd >= 0) no_sigpipe(fd);
  return fd;
}

bool mrn_pipe(int ends[2]) {
#ifdef __linux__
  return pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0;
#else
  if (pipe(ends) != 0) return false;
  if (mrn_set_flags(ends[0]) && mrn_set_flags(ends[1])) return true;
  close(ends[0]);
  close(ends[1]);
  return false;
#endif
}

void mrn_no_delay(int fd, int family) {
  int one = 1;
  if (family == AF_UNIX) return;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}
