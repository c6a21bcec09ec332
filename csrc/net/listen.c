#include "net/listen.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "net/descriptor.h"

#define BACKLOG 511

static bool bind_to(int fd, const mrn_address *address) {
  return bind(fd, (const struct sockaddr *)&address->storage, address->length) == 0;
}

/* Whether a path is a unix socket that nobody listens on: a process that was killed leaves it. */
static bool left_behind(const mrn_address *address) {
  struct stat found;
  const char *path = ((const struct sockaddr_un *)&address->storage)->sun_path;
  if (path[0] == '\0' || lstat(path, &found) != 0 || !S_ISSOCK(found.st_mode)) return false;
  int fd = mrn_socket(AF_UNIX);
  if (fd < 0) return false;
  bool refused = connect(fd, (const struct sockaddr *)&address->storage, address->length) != 0 &&
                 errno == ECONNREFUSED;
  close(fd);
  return refused && unlink(path) == 0;
}

/* False, and errno. */
static bool bind_anew(int fd, const mrn_address *address) {
  if (bind_to(fd, address)) return true;
  if (errno != EADDRINUSE || address->storage.ss_family != AF_UNIX) return false;
  if (left_behind(address)) return bind_to(fd, address);
  errno = EADDRINUSE;
  return false;
}

int mrn_listen(const mrn_address *address, mrn_error *err) {
  int one = 1, family = address->storage.ss_family;
  int fd = mrn_socket(family);
  if (fd < 0) {
    mrn_fail_errno(err, MRN_REFUSED, errno);
    return -1;
  }
  if (family != AF_UNIX) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind_anew(fd, address) && listen(fd, BACKLOG) == 0) return fd;
  mrn_fail_errno(err, MRN_REFUSED, errno);
  close(fd);
  return -1;
}

int mrn_listen_port(int fd) {
  mrn_address address = {.length = sizeof address.storage};
  if (getsockname(fd, (struct sockaddr *)&address.storage, &address.length) != 0) return 0;
  return mrn_address_port(&address);
}

static int accept_one(int fd) {
#ifdef SOCK_NONBLOCK
  return accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
  int accepted = accept(fd, NULL, NULL);
  if (accepted >= 0 && !mrn_set_flags(accepted)) {
    close(accepted);
    return -1;
  }
  return accepted;
#endif
}

/* What accept(2) says about one client only, who is gone: the next one may be there. */
static bool client_gone(int code) {
  return code == EINTR || code == ECONNABORTED || code == EPROTO || code == ENETDOWN ||
         code == EHOSTUNREACH || code == ENETUNREACH;
}

mrn_status mrn_accept(int fd, int *accepted, mrn_error *err) {
  do {
    *accepted = accept_one(fd);
  } while (*accepted < 0 && client_gone(errno));
  if (*accepted >= 0) return MRN_OK;
  if (errno == EAGAIN || errno == EWOULDBLOCK) return MRN_AGAIN;
  return mrn_fail_errno(err, MRN_CLOSED, errno);
}
