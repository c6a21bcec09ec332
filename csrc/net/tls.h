/*
 * TLS over a descriptor that never blocks, by OpenSSL 3.
 *
 * OpenSSL wants a write that could not be finished to be tried again with the same bytes; our
 * callers' bytes may have changed by then (acks are gathered in front of what waits). So records
 * are encrypted into a small buffer of the session's own, which takes whatever the kernel does not,
 * and SSL_write never has to be repeated. The buffer is there only while it is needed.
 */
#ifndef MOONRABBIT_NET_TLS_H
#define MOONRABBIT_NET_TLS_H

#include <stddef.h>

#include "net/result.h"

typedef struct mrn_tls_context mrn_tls_context; /* what many connections share; an SSL_CTX */
typedef struct mrn_tls mrn_tls;                 /* one connection */

typedef struct {
  const char *ca;   /* a file or a folder; NULL: the system's */
  const char *cert; /* PEM files; NULL: none */
  const char *key;  /* NULL: in the certificate's file */
  bool verify;
  int min_version; /* 12 or 13 */
} mrn_tls_options;

mrn_tls_context *mrn_tls_context_new(const mrn_tls_options *options, mrn_error *err);
void mrn_tls_context_free(mrn_tls_context *context);

/* `server_name` is a name or an address in figures; it is sent as SNI (names only), and checked. */
mrn_tls *mrn_tls_new(mrn_tls_context *context, int fd, const char *server_name, mrn_error *err);
/* Without a word to the peer. */
void mrn_tls_free(mrn_tls *tls);

/* *wants is set by every MRN_AGAIN: 'r' or 'w'. */
mrn_status mrn_tls_handshake(mrn_tls *tls, char *wants, mrn_error *err);
mrn_status mrn_tls_read(mrn_tls *tls, void *place, size_t space, size_t *n, char *wants,
                        mrn_error *err);
/* Encrypts; mrn_tls_settle sends. *n bytes were taken, maybe not all. */
mrn_status mrn_tls_write(mrn_tls *tls, const void *bytes, size_t length, size_t *n, char *wants,
                         mrn_error *err);
/* MRN_OK: the kernel has everything. */
mrn_status mrn_tls_settle(mrn_tls *tls, char *wants, mrn_error *err);
/* Sends close_notify if that can be done at once. */
void mrn_tls_shutdown(mrn_tls *tls);

/* The version and cipher in use: "TLSv1.3 TLS_AES_256_GCM_SHA384". */
void mrn_tls_describe(const mrn_tls *tls, char *text, size_t size);

#endif
