#include <errno.h>
#include <openssl/bio.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "net/tls_internal.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* What may wait in `out`: a gathered flush and the answers that TLS itself sends. A peer that
 * makes us answer without ever reading must not make it grow. */
#define OUT_LIMIT ((size_t)160 * 1024)

static BIO_METHOD *methods;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int bio_read(BIO *bio, char *place, int space) {
  mrn_tls *tls = BIO_get_data(bio);
  BIO_clear_retry_flags(bio);
  if (tls->drained) {
    BIO_set_retry_read(bio);
    return -1;
  }
  ssize_t got;
  do {
    got = recv(tls->fd, place, (size_t)space, 0);
  } while (got < 0 && errno == EINTR);
  if (got > 0) {
    tls->drained = got < space;
  } else if (got == 0) {
    tls->ended = true;
  } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
    BIO_set_retry_read(bio);
  } else {
    tls->socket_errno = errno;
  }
  return (int)got;
}

static bool make_room(mrn_tls *tls, size_t length) {
  if (tls->out_end + length <= tls->out_room) return true;
  size_t room = tls->out_room ? tls->out_room : 512;
  while (room < tls->out_end + length) room *= 2;
  uint8_t *bigger = realloc(tls->out, room);
  if (bigger == NULL) return false;
  tls->out = bigger;
  tls->out_room = room;
  return true;
}

static int bio_write(BIO *bio, const char *bytes, int length) {
  mrn_tls *tls = BIO_get_data(bio);
  BIO_clear_retry_flags(bio);
  if (length <= 0) return 0;
  if (tls->out_end - tls->out_start > OUT_LIMIT && !mrn_tls_send(tls)) {
    if (tls->socket_errno == 0) BIO_set_retry_write(bio);
    return -1;
  }
  if (!make_room(tls, (size_t)length)) {
    tls->socket_errno = ENOMEM;
    return -1;
  }
  memcpy(tls->out + tls->out_end, bytes, (size_t)length);
  tls->out_end += (size_t)length;
  return length;
}

static void emptied(mrn_tls *tls) {
  tls->out_start = tls->out_end = 0;
  if (tls->out_room <= 512) return;
  free(tls->out);
  tls->out = NULL;
  tls->out_room = 0;
}

bool mrn_tls_send(mrn_tls *tls) {
  while (tls->out_start < tls->out_end) {
    size_t length = tls->out_end - tls->out_start;
    ssize_t sent = send(tls->fd, tls->out + tls->out_start, length, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) tls->socket_errno = errno;
      return false;
    }
    tls->out_start += (size_t)sent;
    if ((size_t)sent < length) return false;
  }
  emptied(tls);
  return true;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer) {
  (void)bio, (void)number, (void)pointer;
  return command == BIO_CTRL_FLUSH ? 1 : 0; /* we send at the end of an operation, not in it */
}

static int bio_create(BIO *bio) {
  BIO_set_init(bio, 1);
  return 1;
}

static void make_methods(void) {
  BIO_METHOD *made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "moonrabbit socket");
  if (made == NULL) return;
  BIO_meth_set_read(made, bio_read);
  BIO_meth_set_write(made, bio_write);
  BIO_meth_set_ctrl(made, bio_ctrl);
  BIO_meth_set_create(made, bio_create);
  methods = made;
}

/* The module may be unloaded, with the Lua state that has loaded it. */
__attribute__((destructor)) static void free_methods(void) { BIO_meth_free(methods); }

BIO *mrn_tls_bio(mrn_tls *tls) {
  pthread_once(&once, make_methods);
  BIO *bio = methods == NULL ? NULL : BIO_new(methods);
  if (bio != NULL) BIO_set_data(bio, tls);
  return bio;
}
