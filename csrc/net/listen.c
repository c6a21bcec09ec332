#include "net/listen.h"

#include <errno.h>
#include <unistd.h>

#include "net/descriptor.h"

#define BACKLOG 511

int mrn_listen(const mrn_address *address, mrn_error *err) {
  int one = 1, family = address->storage.ss_family;
  int fd = mrn_socket(family);
  if (fd < 0) {
    mrn_fail_errno(err, MRN_REFUSED, errno);
    return -1;
  }
  if (family != AF_UNIX) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(fd, (const struct sockaddr *)&address->storage, address->length) == 0 &&
      listen(fd, BACKLOG) == 0) {
    return fd;
  }
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
