/*
 * A non-blocking connection: TCP or unix, plain or TLS. It buffers nothing but, under TLS, what
 * the kernel would not take of records that are already encrypted.
 *
 * Reading follows one rule: a short read means that the kernel has no more, so the next read
 * answers MRN_AGAIN without a system call; the caller waits for the descriptor (level-triggered),
 * and the read after that asks the kernel.
 */
#ifndef MOONRABBIT_NET_STREAM_H
#define MOONRABBIT_NET_STREAM_H

#include <stddef.h>
#include <stdint.h>

#include "net/address.h"
#include "net/result.h"
#include "net/tls.h"

typedef struct mrn_stream {
  int fd; /* -1: closed */
  uint8_t state;
  char wants;   /* 'r' or 'w': what the last MRN_AGAIN waits for */
  bool drained; /* the kernel had no more at the last read */
  mrn_tls *tls; /* NULL: plain */
  char *name;   /* of the address, for errors, until the handshake is done */
} mrn_stream;

/* A place for bytes that arrive or leave; see csrc/lua/port.h. */
typedef struct {
  uint8_t *(*reserve)(void *ctx, size_t *space);
  void (*commit)(void *ctx, size_t n, double now);
  const uint8_t *(*peek)(void *ctx, size_t *length);
  void (*consume)(void *ctx, size_t n, double now);
  void *ctx;
} mrn_buffers;

void mrn_stream_init(mrn_stream *stream);
/* Takes over a connected descriptor. */
void mrn_stream_adopt(mrn_stream *stream, int fd);
/* Starts connecting. `context` NULL: plain. `server_name` is what the certificate must be for. */
mrn_status mrn_stream_connect(mrn_stream *stream, const mrn_address *address,
                              mrn_tls_context *context, const char *server_name, mrn_error *err);
/* Goes on with the connect and the TLS handshake. */
mrn_status mrn_stream_handshake(mrn_stream *stream, mrn_error *err);

/* MRN_OK: *n > 0 bytes. MRN_CLOSED with the text "" is the peer's orderly end. */
mrn_status mrn_stream_read(mrn_stream *stream, void *place, size_t space, size_t *n,
                           mrn_error *err);
/* MRN_OK: *n > 0 bytes were taken; maybe not all. */
mrn_status mrn_stream_write(mrn_stream *stream, const void *bytes, size_t length, size_t *n,
                            mrn_error *err);
/* MRN_OK: nothing that write took is still here. */
mrn_status mrn_stream_settle(mrn_stream *stream, mrn_error *err);
/* As read, into the buffers. MRN_FULL: they have no room. `now` negative: the clock is read. */
mrn_status mrn_stream_fill(mrn_stream *stream, const mrn_buffers *buffers, double now, size_t *n,
                           mrn_error *err);
/* Blocks, unlike everything else here, until a plain stream has something to read: MRN_AGAIN when it
 * has not within `seconds` or a signal came first. For a caller with nobody else to run meanwhile. */
mrn_status mrn_stream_await(mrn_stream *stream, double seconds, mrn_error *err);
/* MRN_OK: everything that the buffers had has left. */
mrn_status mrn_stream_flush(mrn_stream *stream, const mrn_buffers *buffers, double now,
                            mrn_error *err);
/* What is known of the TLS session, for people; "" on a plain stream. */
void mrn_stream_describe(const mrn_stream *stream, char *text, size_t size);
/* Idempotent. Under TLS it says goodbye, if that can be done at once. */
void mrn_stream_close(mrn_stream *stream);
/* The same without a word: for finalizers. */
void mrn_stream_drop(mrn_stream *stream);

#endif
