#include "net/stream.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "net/clock.h"
#include "net/descriptor.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

/* One fill takes at most this much before the caller gets a chance to look at it. */
#define FILL_LIMIT ((size_t)256 * 1024)
/* TLS records are gathered up to this size before they are sent. */
#define GATHER_LIMIT ((size_t)64 * 1024)

enum { CONNECTING, SECURING, OPEN };

/* ---- life ---- */

void mrn_stream_init(mrn_stream *stream) {
  memset(stream, 0, sizeof *stream);
  stream->fd = -1;
  stream->wants = 'r';
}

void mrn_stream_adopt(mrn_stream *stream, int fd) {
  struct sockaddr_storage own = {.ss_family = AF_UNIX};
  socklen_t length = sizeof own;
  stream->fd = fd;
  stream->state = OPEN;
  if (getsockname(fd, (struct sockaddr *)&own, &length) == 0) mrn_no_delay(fd, own.ss_family);
}

void mrn_stream_drop(mrn_stream *stream) {
  mrn_tls_free(stream->tls);
  stream->tls = NULL;
  if (stream->fd >= 0) close(stream->fd);
  stream->fd = -1;
  free(stream->name);
  stream->name = NULL;
}

void mrn_stream_close(mrn_stream *stream) {
  if (stream->tls != NULL && stream->state == OPEN) mrn_tls_shutdown(stream->tls);
  mrn_stream_drop(stream);
}

void mrn_stream_describe(const mrn_stream *stream, char *text, size_t size) {
  text[0] = '\0';
  if (stream->tls != NULL) mrn_tls_describe(stream->tls, text, size);
}

static mrn_status again(mrn_stream *stream, char wants) {
  stream->wants = wants;
  return MRN_AGAIN;
}

static mrn_status closed_by_us(mrn_error *err) { return mrn_fail(err, MRN_CLOSED, "closed"); }

/* ---- connecting ---- */

static mrn_status connect_failed(mrn_stream *stream, int code, mrn_error *err) {
  mrn_status status = code == ETIMEDOUT ? MRN_TIMEOUT : MRN_REFUSED;
  mrn_fail_errno(err, status, code);
  if (stream->name != NULL) mrn_error_prefix(err, stream->name);
  return status;
}

static mrn_status start(mrn_stream *stream, const mrn_address *address) {
  stream->fd = mrn_socket(address->storage.ss_family);
  if (stream->fd < 0) return MRN_REFUSED;
  mrn_no_delay(stream->fd, address->storage.ss_family);
  if (connect(stream->fd, (const struct sockaddr *)&address->storage, address->length) == 0) {
    stream->state = SECURING;
    return MRN_OK;
  }
  /* An interrupted connect goes on by itself, as one in progress does. A unix socket whose backlog
   * is full says EAGAIN and does not go on: that is a refusal. */
  return errno == EINPROGRESS || errno == EINTR ? MRN_OK : MRN_REFUSED;
}

mrn_status mrn_stream_connect(mrn_stream *stream, const mrn_address *address,
                              mrn_tls_context *context, const char *server_name, mrn_error *err) {
  char name[MRN_ADDRESS_TEXT];
  mrn_address_format(address, name);
  stream->name = strdup(name);
  stream->state = CONNECTING;
  stream->wants = 'w';
  if (start(stream, address) != MRN_OK) {
    int code = errno;
    mrn_status status = connect_failed(stream, code, err);
    mrn_stream_close(stream);
    return status;
  }
  if (context == NULL) return MRN_OK;
  stream->tls = mrn_tls_new(context, stream->fd, server_name, err);
  if (stream->tls != NULL) return MRN_OK;
  mrn_stream_close(stream);
  return MRN_TLS;
}

static mrn_status finish_connect(mrn_stream *stream, mrn_error *err) {
  struct pollfd ready = {.fd = stream->fd, .events = POLLOUT};
  int code = 0;
  socklen_t length = sizeof code;
  if (poll(&ready, 1, 0) <= 0) return again(stream, 'w');
  if (getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &code, &length) != 0) code = errno;
  if (code != 0) return connect_failed(stream, code, err);
  stream->state = SECURING;
  return MRN_OK;
}

static mrn_status secure(mrn_stream *stream, mrn_error *err) {
  mrn_status status = MRN_OK;
  if (stream->tls != NULL) status = mrn_tls_handshake(stream->tls, &stream->wants, err);
  if (status == MRN_AGAIN) return status;
  if (status != MRN_OK) {
    if (stream->name != NULL) mrn_error_prefix(err, stream->name);
    return status;
  }
  stream->state = OPEN;
  free(stream->name);
  stream->name = NULL;
  return MRN_OK;
}

mrn_status mrn_stream_handshake(mrn_stream *stream, mrn_error *err) {
  mrn_status status = MRN_OK;
  if (stream->fd < 0) return closed_by_us(err);
  if (stream->state == CONNECTING) status = finish_connect(stream, err);
  if (status == MRN_OK && stream->state == SECURING) status = secure(stream, err);
  return status;
}

/* Reading and writing before the handshake was asked for to the end is a handshake first. */
static mrn_status ready(mrn_stream *stream, mrn_error *err) {
  if (stream->fd >= 0 && stream->state == OPEN) return MRN_OK;
  return mrn_stream_handshake(stream, err);
}

/* ---- reading ---- */

static mrn_status receive(mrn_stream *stream, void *place, size_t space, size_t *n,
                          mrn_error *err) {
  ssize_t got;
  do {
    got = recv(stream->fd, place, space, 0);
  } while (got < 0 && errno == EINTR);
  if (got > 0) {
    *n = (size_t)got;
    stream->drained = *n < space;
    return MRN_OK;
  }
  if (got == 0) return mrn_fail(err, MRN_CLOSED, "%s", "");
  if (errno == EAGAIN || errno == EWOULDBLOCK) return again(stream, 'r');
  return mrn_fail_errno(err, MRN_CLOSED, errno);
}

static mrn_status decrypt(mrn_stream *stream, void *place, size_t space, size_t *n,
                          mrn_error *err) {
  size_t total = 0, part = 0;
  mrn_status status = MRN_OK;
  while (total < space && status == MRN_OK) {
    status =
        mrn_tls_read(stream->tls, (char *)place + total, space - total, &part, &stream->wants, err);
    if (status == MRN_OK) total += part;
  }
  *n = total;
  if (total == 0) return status;
  /* An end or an error is met again by the next read, which has to ask. */
  stream->drained = status == MRN_AGAIN && stream->wants == 'r';
  return MRN_OK;
}

static mrn_status read_some(mrn_stream *stream, void *place, size_t space, size_t *n,
                            mrn_error *err) {
  if (stream->drained) {
    stream->drained = false;
    return again(stream, 'r');
  }
  if (stream->tls != NULL) return decrypt(stream, place, space, n, err);
  return receive(stream, place, space, n, err);
}

mrn_status mrn_stream_read(mrn_stream *stream, void *place, size_t space, size_t *n,
                           mrn_error *err) {
  mrn_status status = ready(stream, err);
  return status == MRN_OK ? read_some(stream, place, space, n, err) : status;
}

mrn_status mrn_stream_fill(mrn_stream *stream, const mrn_buffers *buffers, double now, size_t *n,
                           mrn_error *err) {
  mrn_status status = ready(stream, err);
  *n = 0;
  while (status == MRN_OK && *n < FILL_LIMIT) {
    size_t space = 0, part = 0;
    uint8_t *place = buffers->reserve(buffers->ctx, &space);
    if (place == NULL || space == 0) return *n > 0 ? MRN_OK : MRN_FULL;
    status = read_some(stream, place, space, &part, err);
    if (status != MRN_OK) break;
    buffers->commit(buffers->ctx, part, now < 0 ? mrn_now() : now);
    *n += part;
    if (stream->drained || part < space) break;
  }
  return *n > 0 ? MRN_OK : status;
}

static int milliseconds(double seconds) {
  const double most = 3600;
  return (int)((seconds < most ? seconds : most) * 1000) + 1;
}

mrn_status mrn_stream_await(mrn_stream *stream, double seconds, mrn_error *err) {
  mrn_status status = ready(stream, err);
  if (status != MRN_OK) return status;
  struct pollfd fd = {.fd = stream->fd, .events = POLLIN};
  if (poll(&fd, 1, milliseconds(seconds)) <= 0) return again(stream, 'r');
  stream->drained = false;
  return MRN_OK;
}

/* ---- writing ---- */

static mrn_status send_some(mrn_stream *stream, const void *bytes, size_t length, size_t *n,
                            mrn_error *err) {
  ssize_t sent;
  do {
    sent = send(stream->fd, bytes, length, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) {
    *n = (size_t)sent;
    return MRN_OK;
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK) return again(stream, 'w');
  return mrn_fail_errno(err, MRN_CLOSED, errno);
}

mrn_status mrn_stream_settle(mrn_stream *stream, mrn_error *err) {
  if (stream->fd < 0) return closed_by_us(err);
  if (stream->tls == NULL) return MRN_OK;
  return mrn_tls_settle(stream->tls, &stream->wants, err);
}

static mrn_status encrypt(mrn_stream *stream, const char *bytes, size_t length, size_t *n,
                          mrn_error *err) {
  size_t part = 0;
  mrn_status status = MRN_OK;
  *n = 0;
  while (status == MRN_OK && *n < length && *n < GATHER_LIMIT) {
    status = mrn_tls_write(stream->tls, bytes + *n, length - *n, &part, &stream->wants, err);
    if (status == MRN_OK) *n += part;
  }
  return *n > 0 ? MRN_OK : status;
}

/* A TLS write that was taken may still wait for the socket: its AGAIN comes with the next one. */
static mrn_status write_tls(mrn_stream *stream, const void *bytes, size_t length, size_t *n,
                            mrn_error *err) {
  mrn_status status = mrn_tls_settle(stream->tls, &stream->wants, err);
  if (status == MRN_OK) status = encrypt(stream, bytes, length, n, err);
  if (status != MRN_OK) return status;
  status = mrn_tls_settle(stream->tls, &stream->wants, err);
  return status == MRN_AGAIN ? MRN_OK : status;
}

mrn_status mrn_stream_write(mrn_stream *stream, const void *bytes, size_t length, size_t *n,
                            mrn_error *err) {
  mrn_status status = ready(stream, err);
  *n = 0;
  if (status != MRN_OK || length == 0) return status;
  if (stream->tls != NULL) return write_tls(stream, bytes, length, n, err);
  return send_some(stream, bytes, length, n, err);
}

mrn_status mrn_stream_flush(mrn_stream *stream, const mrn_buffers *buffers, double now,
                            mrn_error *err) {
  size_t length = 0, n = 0;
  const uint8_t *bytes;
  mrn_status status = ready(stream, err);
  while (status == MRN_OK && (bytes = buffers->peek(buffers->ctx, &length)) != NULL) {
    if (length == 0) break;
    status = mrn_stream_write(stream, bytes, length, &n, err);
    if (status != MRN_OK) return status;
    buffers->consume(buffers->ctx, n, now < 0 ? mrn_now() : now);
    /* A short send means that the kernel is full: no need to hear that from a second one. */
    if (stream->tls == NULL && n < length) return again(stream, 'w');
  }
  return status == MRN_OK ? mrn_stream_settle(stream, err) : status;
}
