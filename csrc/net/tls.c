#include "net/tls.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net/address.h"
#include "net/tls_internal.h"

/* ---- life ---- */

/* "[::1]" and "fe80::1%eth0" as the check of an address wants them. */
static void bare_address(const char *host, char *bare, size_t size) {
  snprintf(bare, size, "%s", host[0] == '[' ? host + 1 : host);
  bare[strcspn(bare, "]%")] = '\0';
}

static bool expect_address(SSL *ssl, const char *host) {
  char bare[96];
  bare_address(host, bare, sizeof bare);
  return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), bare) == 1;
}

static bool expect_name(SSL *ssl, const char *host) {
  SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
  return SSL_set_tlsext_host_name(ssl, host) == 1 && SSL_set1_host(ssl, host) == 1;
}

static mrn_status expect(mrn_tls *tls, bool verify, const char *host, mrn_error *err) {
  if (host == NULL || host[0] == '\0') {
    if (!verify) return MRN_OK;
    return mrn_fail(err, MRN_TLS, "no host name to check the certificate for (tls.server_name)");
  }
  bool literal = mrn_address_literal(host, 0, NULL);
  if (literal ? expect_address(tls->ssl, host) : expect_name(tls->ssl, host)) return MRN_OK;
  return mrn_tls_fail(err, "tls.server_name");
}

static bool attach(mrn_tls *tls, mrn_tls_context *context) {
  tls->ssl = SSL_new(context->ctx);
  if (tls->ssl == NULL) return false;
  BIO *bio = mrn_tls_bio(tls);
  if (bio == NULL) return false;
  SSL_set_bio(tls->ssl, bio, bio);
  SSL_set_connect_state(tls->ssl);
  mrn_tls_note_failures(tls);
  return true;
}

mrn_tls *mrn_tls_new(mrn_tls_context *context, int fd, const char *server_name, mrn_error *err) {
  mrn_tls *tls = calloc(1, sizeof *tls);
  ERR_clear_error();
  if (tls == NULL) {
    mrn_fail_errno(err, MRN_TLS, ENOMEM);
    return NULL;
  }
  tls->fd = fd;
  mrn_status status = attach(tls, context) ? expect(tls, context->verify, server_name, err)
                                           : mrn_tls_fail(err, "TLS");
  if (status == MRN_OK) return tls;
  mrn_tls_free(tls);
  return NULL;
}

void mrn_tls_free(mrn_tls *tls) {
  if (tls == NULL) return;
  SSL_free(tls->ssl);
  free(tls->out);
  free(tls->why);
  free(tls);
}

/* ---- operations ---- */

/* OpenSSL's queue belongs to the thread: what others left there must not be taken for ours. */
static void begin(mrn_tls *tls) {
  ERR_clear_error();
  tls->drained = false;
}

static mrn_status transport_ended(mrn_tls *tls, mrn_error *err) {
  ERR_clear_error();
  if (tls->socket_errno != 0) return mrn_fail_errno(err, MRN_CLOSED, tls->socket_errno);
  return mrn_fail(err, MRN_CLOSED, "the peer closed the connection without ending TLS");
}

/* Answers of TLS itself (handshake, key update, alert) leave with whatever operation made them. */
static mrn_status conclude(mrn_tls *tls, int result, char *wants, mrn_error *err) {
  int code = SSL_get_error(tls->ssl, result);
  bool sent = mrn_tls_send(tls);
  if (code != SSL_ERROR_SSL && tls->socket_errno != 0) return transport_ended(tls, err);
  switch (code) {
    case SSL_ERROR_WANT_READ:
      *wants = sent || SSL_is_init_finished(tls->ssl) ? 'r' : 'w';
      return MRN_AGAIN;
    case SSL_ERROR_WANT_WRITE: *wants = 'w'; return MRN_AGAIN;
    case SSL_ERROR_ZERO_RETURN: return mrn_fail(err, MRN_CLOSED, "%s", "");
    case SSL_ERROR_SSL:
      return tls->socket_errno != 0 ? transport_ended(tls, err) : mrn_tls_explain(tls, err);
    default: return transport_ended(tls, err);
  }
}

mrn_status mrn_tls_handshake(mrn_tls *tls, char *wants, mrn_error *err) {
  if (!SSL_is_init_finished(tls->ssl)) {
    begin(tls);
    int result = SSL_do_handshake(tls->ssl);
    if (result != 1) return conclude(tls, result, wants, err);
  }
  return mrn_tls_settle(tls, wants, err);
}

mrn_status mrn_tls_read(mrn_tls *tls, void *place, size_t space, size_t *n, char *wants,
                        mrn_error *err) {
  begin(tls);
  if (SSL_read_ex(tls->ssl, place, space, n) == 1) return MRN_OK;
  return conclude(tls, 0, wants, err);
}

mrn_status mrn_tls_write(mrn_tls *tls, const void *bytes, size_t length, size_t *n, char *wants,
                         mrn_error *err) {
  begin(tls);
  if (SSL_write_ex(tls->ssl, bytes, length, n) == 1) return MRN_OK;
  return conclude(tls, 0, wants, err);
}

mrn_status mrn_tls_settle(mrn_tls *tls, char *wants, mrn_error *err) {
  if (mrn_tls_send(tls)) return MRN_OK;
  if (tls->socket_errno != 0) return transport_ended(tls, err);
  *wants = 'w';
  return MRN_AGAIN;
}

void mrn_tls_shutdown(mrn_tls *tls) {
  if (tls->socket_errno != 0 || !SSL_is_init_finished(tls->ssl)) return;
  ERR_clear_error();
  SSL_shutdown(tls->ssl);
  mrn_tls_send(tls);
  ERR_clear_error();
}

void mrn_tls_describe(const mrn_tls *tls, char *text, size_t size) {
  snprintf(text, size, "%s %s", SSL_get_version(tls->ssl), SSL_get_cipher_name(tls->ssl));
}
