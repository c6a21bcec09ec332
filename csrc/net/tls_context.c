#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509err.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "net/tls_internal.h"

#define READ_BUFFER ((size_t)64 * 1024)

/* Without this OpenSSL asks for the passphrase of a key on the terminal, and waits. */
static int no_passphrase(char *buffer, /* NOLINT(readability-non-const-parameter): OpenSSL's type */
                         int size, int writing, void *asked) {
  (void)buffer, (void)size, (void)writing;
  *(bool *)asked = true;
  return 0;
}

static mrn_status file_failed(mrn_error *err, const char *what, const char *path) {
  char text[300];
  snprintf(text, sizeof text, "%s %s", what, path);
  return mrn_tls_fail(err, text);
}

static mrn_status load_authorities(SSL_CTX *ctx, const char *ca, mrn_error *err) {
  struct stat info;
  if (ca == NULL) {
    if (SSL_CTX_set_default_verify_paths(ctx) == 1) return MRN_OK;
    return mrn_tls_fail(err, "the system's certificate authorities");
  }
  bool folder = stat(ca, &info) == 0 && S_ISDIR(info.st_mode);
  int done = folder ? SSL_CTX_load_verify_dir(ctx, ca) : SSL_CTX_load_verify_file(ctx, ca);
  return done == 1 ? MRN_OK : file_failed(err, "tls.ca", ca);
}

static bool is_mismatch(unsigned long code) {
  return ERR_GET_LIB(code) == ERR_LIB_X509 && ERR_GET_REASON(code) == X509_R_KEY_VALUES_MISMATCH;
}

/* OpenSSL compares it with the certificate, which is loaded before. */
static mrn_status load_key(SSL_CTX *ctx, const char *path, mrn_error *err) {
  bool asked = false;
  SSL_CTX_set_default_passwd_cb(ctx, no_passphrase);
  SSL_CTX_set_default_passwd_cb_userdata(ctx, &asked);
  int done = SSL_CTX_use_PrivateKey_file(ctx, path, SSL_FILETYPE_PEM);
  SSL_CTX_set_default_passwd_cb_userdata(ctx, NULL);
  SSL_CTX_set_default_passwd_cb(ctx, NULL);
  if (done == 1) return MRN_OK;
  if (is_mismatch(ERR_peek_last_error())) {
    return mrn_tls_fail(err, "tls.cert and tls.key do not belong together");
  }
  if (!asked) return file_failed(err, "tls.key", path);
  ERR_clear_error();
  return mrn_fail(err, MRN_TLS, "tls.key %s: the key is encrypted, which is not supported", path);
}

static mrn_status load_identity(SSL_CTX *ctx, const mrn_tls_options *options, mrn_error *err) {
  const char *key = options->key != NULL ? options->key : options->cert;
  if (options->cert == NULL) {
    if (options->key == NULL) return MRN_OK;
    return mrn_fail(err, MRN_TLS, "tls.key without tls.cert");
  }
  if (SSL_CTX_use_certificate_chain_file(ctx, options->cert) != 1) {
    return file_failed(err, "tls.cert", options->cert);
  }
  return load_key(ctx, key, err);
}

static void set_behaviour(SSL_CTX *ctx) {
  SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                            SSL_MODE_RELEASE_BUFFERS);
  /* One recv takes many records; the buffer is there only while it holds something. */
  SSL_CTX_set_read_ahead(ctx, 1);
  SSL_CTX_set_default_read_buffer_len(ctx, READ_BUFFER);
}

static mrn_status configure(mrn_tls_context *context, const mrn_tls_options *options,
                            mrn_error *err) {
  int version = options->min_version >= 13 ? TLS1_3_VERSION : TLS1_2_VERSION;
  set_behaviour(context->ctx);
  if (SSL_CTX_set_min_proto_version(context->ctx, version) != 1) {
    return mrn_tls_fail(err, "tls.min_version");
  }
  SSL_CTX_set_verify(context->ctx, options->verify ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, NULL);
  mrn_status status = MRN_OK;
  if (options->verify) status = load_authorities(context->ctx, options->ca, err);
  return status == MRN_OK ? load_identity(context->ctx, options, err) : status;
}

mrn_tls_context *mrn_tls_context_new(const mrn_tls_options *options, mrn_error *err) {
  mrn_tls_context *context = calloc(1, sizeof *context);
  ERR_clear_error();
  if (context != NULL) context->ctx = SSL_CTX_new(TLS_client_method());
  if (context == NULL || context->ctx == NULL) {
    mrn_tls_fail(err, "TLS");
    mrn_tls_context_free(context);
    return NULL;
  }
  context->verify = options->verify;
  if (configure(context, options, err) == MRN_OK) return context;
  mrn_tls_context_free(context);
  return NULL;
}

void mrn_tls_context_free(mrn_tls_context *context) {
  if (context == NULL) return;
  SSL_CTX_free(context->ctx);
  free(context);
}
