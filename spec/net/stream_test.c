/*
 * Signals that come in the middle of a system call: the program's own connect, send and recv stand in front of the
 * system's and are interrupted as often as a test says.
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net/stream.h"

static struct {
  int connects, sends, receives; /* so many of the next ones are interrupted */
} interrupted;

static bool interrupts(int *left) {
  if (*left == 0) return false;
  --*left;
  errno = EINTR;
  return true;
}

#define HOOK __attribute__((visibility("default")))
#define REAL(name) ((__typeof__(&(name)))dlsym(RTLD_NEXT, #name))

/* An interrupted connect goes on in the kernel, as POSIX has it. */
HOOK int connect(int fd, const struct sockaddr *address, socklen_t length) {
  int result = REAL(connect)(fd, address, length);
  return interrupts(&interrupted.connects) ? -1 : result;
}

HOOK ssize_t send(int fd, const void *bytes, size_t length, int flags) {
  return interrupts(&interrupted.sends) ? -1 : REAL(send)(fd, bytes, length, flags);
}

HOOK ssize_t recv(int fd, void *place, size_t space, int flags) {
  return interrupts(&interrupted.receives) ? -1 : REAL(recv)(fd, place, space, flags);
}

/* ---- the other end ---- */

static mrn_address where;

static int listener(bool listens) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in *own = (struct sockaddr_in *)&where.storage;
  where = (mrn_address){.length = sizeof *own};
  own->sin_family = AF_INET;
  own->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK(bind(fd, (struct sockaddr *)own, sizeof *own) == 0);
  CHECK(getsockname(fd, (struct sockaddr *)own, &where.length) == 0);
  if (listens) CHECK(listen(fd, 1) == 0);
  return fd;
}

static mrn_status settled(mrn_stream *stream, mrn_error *err) {
  mrn_status status;
  while ((status = mrn_stream_handshake(stream, err)) == MRN_AGAIN) {
    struct pollfd ready = {.fd = stream->fd, .events = POLLOUT};
    CHECK(poll(&ready, 1, 5000) == 1);
  }
  return status;
}

/* ---- tests ---- */

static void an_interrupted_connect_goes_on_and_the_stream_works(void) {
  mrn_stream stream;
  mrn_error err = {0};
  char bytes[8] = "";
  size_t n = 0;
  int server = listener(true);
  mrn_stream_init(&stream);
  interrupted.connects = 1;
  if (mrn_stream_connect(&stream, &where, NULL, NULL, &err) != MRN_OK) FAIL("%s", err.text);
  CHECK_EQ(interrupted.connects, 0);
  if (settled(&stream, &err) != MRN_OK) FAIL("%s", err.text);
  int peer = accept(server, NULL, NULL);
  interrupted.sends = interrupted.receives = 2;
  CHECK_EQ(mrn_stream_write(&stream, "ping", 4, &n, &err), MRN_OK);
  CHECK_EQ(n, 4);
  CHECK_EQ(interrupted.sends, 0);
  CHECK_EQ(read(peer, bytes, sizeof bytes), 4);
  CHECK_EQ(write(peer, "pong!", 5), 5);
  CHECK_EQ(mrn_stream_read(&stream, bytes, sizeof bytes, &n, &err), MRN_OK);
  CHECK_EQ(interrupted.receives, 0);
  CHECK_BYTES(bytes, n, "pong!", 5);
  mrn_stream_close(&stream);
  close(peer);
  close(server);
}

static void an_interrupted_connect_that_is_refused_later_says_so(void) {
  mrn_stream stream;
  mrn_error err = {0};
  int taken = listener(false);
  mrn_stream_init(&stream);
  interrupted.connects = 1;
  CHECK_EQ(mrn_stream_connect(&stream, &where, NULL, NULL, &err), MRN_OK);
  CHECK_EQ(settled(&stream, &err), MRN_REFUSED);
  CHECK(strstr(err.text, "connection refused") != NULL);
  mrn_stream_close(&stream);
  close(taken);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(an_interrupted_connect_goes_on_and_the_stream_works);
  RUN(an_interrupted_connect_that_is_refused_later_says_so);
  return check_end();
}
