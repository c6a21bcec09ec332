/* What the tls_*.c files share. */
#ifndef MOONRABBIT_NET_TLS_INTERNAL_H
#define MOONRABBIT_NET_TLS_INTERNAL_H

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>

#include "net/tls.h"

struct mrn_tls_context {
  SSL_CTX *ctx;
  bool verify;
};

struct mrn_tls {
  SSL *ssl;
  int fd;
  int socket_errno; /* of the last recv or send that failed for good; 0: none */
  bool drained;     /* the last recv was short: the next one waits for a new operation */
  bool ended;       /* recv said end of stream */
  uint8_t *out;     /* records that the kernel has not taken yet */
  size_t out_start, out_end, out_room;
  char *why; /* what the verification of the certificate found */
};

/* The transport of a session: its descriptor. NULL: out of memory. */
BIO *mrn_tls_bio(mrn_tls *tls);
/* Sends what waits in `out`. False: the kernel is full, or socket_errno is set. */
bool mrn_tls_send(mrn_tls *tls);

/* Has the session's certificate check note what fails; `why` says it afterwards. */
void mrn_tls_note_failures(mrn_tls *tls);
/* The newest error of OpenSSL's queue, in one line, without its codes; empties the queue. */
mrn_status mrn_tls_fail(mrn_error *err, const char *what);
/* Why an operation on the session ended with an SSL_ERROR_SSL. */
mrn_status mrn_tls_explain(mrn_tls *tls, mrn_error *err);

#endif
