/*
 * What TLS itself sends without being asked to: answers to key updates and to a wish to renegotiate. The peer is
 * OpenSSL's server at the other end of a socket pair, in this process.
 */
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net/tls_internal.h"

typedef struct {
  mrn_tls_context *context;
  mrn_tls *tls;
  SSL_CTX *server_context;
  SSL *server;
  int ends[2];
} session;

/* ---- the server ---- */

static void sign_itself(SSL_CTX *context) {
  EVP_PKEY *key = EVP_EC_gen("P-256");
  X509 *certificate = X509_new();
  ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
  X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
  X509_set_pubkey(certificate, key);
  CHECK(X509_sign(certificate, key, EVP_sha256()) > 0);
  CHECK_EQ(SSL_CTX_use_certificate(context, certificate), 1);
  CHECK_EQ(SSL_CTX_use_PrivateKey(context, key), 1);
  X509_free(certificate);
  EVP_PKEY_free(key);
}

static void serve(session *s, int version) {
  s->server_context = SSL_CTX_new(TLS_server_method());
  SSL_CTX_set_max_proto_version(s->server_context, version);
  SSL_CTX_set_num_tickets(s->server_context, 0);
  sign_itself(s->server_context);
  s->server = SSL_new(s->server_context);
  SSL_set_fd(s->server, s->ends[1]);
  SSL_set_accept_state(s->server);
}

/* ---- a session of the two ---- */

static mrn_status shake(session *s) {
  mrn_error err = {0};
  char wants = 0;
  mrn_status status = mrn_tls_handshake(s->tls, &wants, &err);
  if (status != MRN_OK && status != MRN_AGAIN) FAIL("%s", err.text);
  return status;
}

static session begin(int version) {
  session s = {0};
  mrn_error err = {0};
  const mrn_tls_options options = {.verify = false, .min_version = 12};
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, s.ends) == 0);
  for (int i = 0; i < 2; i++) CHECK(fcntl(s.ends[i], F_SETFL, O_NONBLOCK) == 0);
  serve(&s, version);
  s.context = mrn_tls_context_new(&options, &err);
  CHECK(s.context != NULL);
  s.tls = mrn_tls_new(s.context, s.ends[0], NULL, &err);
  CHECK(s.tls != NULL);
  for (int turn = 0; turn < 20; turn++) {
    mrn_status ours = shake(&s);
    if (SSL_do_handshake(s.server) == 1 && ours == MRN_OK) return s;
  }
  FAIL("no handshake");
}

static void end(session *s) {
  mrn_tls_free(s->tls);
  mrn_tls_context_free(s->context);
  SSL_free(s->server);
  SSL_CTX_free(s->server_context);
  for (int i = 0; i < 2; i++) close(s->ends[i]);
  ERR_clear_error();
}

/* One read of ours; *wants is set when there is nothing. */
static mrn_status take(session *s, char *place, size_t space, size_t *n, char *wants) {
  mrn_error err = {0};
  mrn_status status = mrn_tls_read(s->tls, place, space, n, wants, &err);
  if (status != MRN_OK && status != MRN_AGAIN) FAIL("%s", err.text);
  return status;
}

/* ---- tests ---- */

/* As many key updates that want an answer as the socket takes. */
static size_t ask_for_answers(session *s) {
  size_t asked = 0;
  while (SSL_key_update(s->server, SSL_KEY_UPDATE_REQUESTED) == 1 &&
         SSL_do_handshake(s->server) == 1) {
    asked++;
  }
  SSL_do_handshake(s->server); /* what the socket did not take goes first, once there is room */
  ERR_clear_error();
  return asked;
}

/* The bound, what a flush gathers above it, and the record that is the first not to fit. */
#define MOST_THAT_WAITS ((size_t)(160 + 64 + 17) * 1024)

/* Until nothing is read any more: many times what all the buffers take. */
static char flood(session *s) {
  char byte, wants = 0;
  size_t asked = 0, n = 0;
  for (int idle = 0; idle < 3;) {
    size_t more = ask_for_answers(s);
    asked += more;
    idle = more == 0 ? idle + 1 : 0;
    CHECK_EQ(take(s, &byte, 1, &n, &wants), MRN_AGAIN);
    CHECK(s->tls->out_end - s->tls->out_start <= MOST_THAT_WAITS);
    CHECK(asked < 200000);
  }
  return wants;
}

static void take_answers(session *s) {
  static char bytes[65536];
  while (recv(s->ends[1], bytes, sizeof bytes, 0) > 0) continue;
}

static void a_peer_that_makes_TLS_answer_and_does_not_read_is_read_no_further(void) {
  session s = begin(TLS1_3_VERSION);
  char byte = 0, wants = flood(&s);
  size_t n = 0;
  CHECK_EQ(wants, 'w');
  /* Once somebody takes the answers, all goes on: OpenSSL's server itself would not read while it has to write. */
  while (SSL_write(s.server, "x", 1) != 1) {
    ERR_clear_error();
    take_answers(&s);
    CHECK_EQ(take(&s, &byte, 1, &n, &wants), MRN_AGAIN);
  }
  while (take(&s, &byte, 1, &n, &wants) == MRN_AGAIN) take_answers(&s);
  CHECK_BYTES(&byte, n, "x", 1);
  end(&s);
}

static void a_wish_to_renegotiate_is_declined_and_the_connection_goes_on(void) {
  session s = begin(TLS1_2_VERSION);
  char bytes[8] = "", wants = 0;
  size_t n = 0;
  CHECK_EQ(SSL_renegotiate(s.server), 1);
  CHECK_EQ(SSL_do_handshake(s.server), 1); /* a HelloRequest is all of it */
  CHECK_EQ(SSL_write(s.server, "after", 5), 5);
  CHECK_EQ(take(&s, bytes, sizeof bytes, &n, &wants), MRN_OK);
  CHECK_BYTES(bytes, n, "after", 5);
  mrn_error err = {0};
  mrn_tls_settle(s.tls, &wants, &err);
  CHECK(SSL_is_init_finished(s.tls->ssl));
  CHECK_EQ(SSL_read(s.server, bytes, sizeof bytes), -1);
  CHECK_EQ(ERR_GET_REASON(ERR_peek_error()), SSL_R_NO_RENEGOTIATION);
  end(&s);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(a_peer_that_makes_TLS_answer_and_does_not_read_is_read_no_further);
  RUN(a_wish_to_renegotiate_is_declined_and_the_connection_goes_on);
  return check_end();
}
