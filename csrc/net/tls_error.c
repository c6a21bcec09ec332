/* TLS failures in words that say what is wrong with which certificate. */
#include <ctype.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net/tls_internal.h"

/* ---- names in certificates ---- */

/* A certificate that is not trusted may hold anything: only printable ASCII is repeated. */
static void append(char *text, size_t size, const char *bytes, int length) {
  size_t used = strlen(text);
  if (used > 0 && used + 3 < size) used += (size_t)snprintf(text + used, size - used, ", ");
  for (int i = 0; i < length && used + 1 < size; i++) {
    unsigned char c = (unsigned char)bytes[i];
    text[used++] = c < 0x80 && isprint(c) ? (char)c : '?';
  }
  text[used] = '\0';
}

static void append_ip(char *text, size_t size, const ASN1_OCTET_STRING *ip) {
  char figures[64] = "";
  const unsigned char *b = ASN1_STRING_get0_data(ip);
  if (ASN1_STRING_length(ip) == 4) {
    snprintf(figures, sizeof figures, "%d.%d.%d.%d", b[0], b[1], b[2], b[3]);
  } else if (ASN1_STRING_length(ip) == 16) {
    for (int i = 0; i < 16; i += 2) {
      size_t used = strlen(figures);
      snprintf(figures + used, sizeof figures - used, "%s%x", i ? ":" : "", b[i] << 8 | b[i + 1]);
    }
  }
  append(text, size, figures, (int)strlen(figures));
}

static void append_alternatives(char *text, size_t size, X509 *cert) {
  GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
  for (int i = 0; names != NULL && i < sk_GENERAL_NAME_num(names); i++) {
    const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS) {
      append(text, size, (const char *)ASN1_STRING_get0_data(name->d.dNSName),
             ASN1_STRING_length(name->d.dNSName));
    } else if (name->type == GEN_IPADD) {
      append_ip(text, size, name->d.iPAddress);
    }
  }
  GENERAL_NAMES_free(names);
}

/* The common name counts only where there is no alternative name. */
static void list_names(char *text, size_t size, X509 *cert) {
  text[0] = '\0';
  append_alternatives(text, size, cert);
  if (text[0] != '\0') return;
  char common[128] = "";
  int length = X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName, common,
                                         (int)sizeof common);
  append(text, size, length > 0 ? common : "no name", length > 0 ? length : 7);
}

/* ---- the verification of the peer ---- */

static bool is_mismatch(int code) {
  return code == X509_V_ERR_HOSTNAME_MISMATCH || code == X509_V_ERR_IP_ADDRESS_MISMATCH;
}

static void note(mrn_tls *tls, X509_STORE_CTX *store) {
  char text[256] = "", names[160] = "";
  int code = X509_STORE_CTX_get_error(store);
  X509 *cert = X509_STORE_CTX_get_current_cert(store);
  if (is_mismatch(code) && cert != NULL) {
    list_names(names, sizeof names, cert);
    snprintf(text, sizeof text, "host name mismatch: certificate is for %s", names);
  } else {
    snprintf(text, sizeof text, "certificate verify failed: %s",
             X509_verify_cert_error_string(code));
  }
  if (tls->why == NULL) tls->why = strdup(text);
}

static int verify_callback(int good, X509_STORE_CTX *store) {
  if (good) return good;
  SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
  mrn_tls *tls = ssl == NULL ? NULL : SSL_get_app_data(ssl);
  if (tls != NULL) note(tls, store);
  return good;
}

void mrn_tls_note_failures(mrn_tls *tls) {
  SSL_set_app_data(tls->ssl, tls);
  SSL_set_verify(tls->ssl, SSL_get_verify_mode(tls->ssl), verify_callback);
}

/* ---- OpenSSL's queue ---- */

mrn_status mrn_tls_fail(mrn_error *err, const char *what) {
  const char *data = NULL;
  int flags = 0;
  unsigned long code = ERR_peek_last_error_all(NULL, NULL, NULL, &data, &flags);
  const char *reason = code == 0 ? NULL : ERR_reason_error_string(code);
  if (reason == NULL) reason = "unknown error";
  mrn_fail(err, MRN_TLS, "%s: %s", what, reason);
  ERR_clear_error();
  return MRN_TLS;
}

static bool not_tls(int reason) {
  return reason == SSL_R_WRONG_VERSION_NUMBER || reason == SSL_R_HTTP_REQUEST ||
         reason == SSL_R_PACKET_LENGTH_TOO_LONG || reason == SSL_R_RECORD_LENGTH_MISMATCH;
}

/* "sslv3 alert bad certificate", "tlsv13 alert certificate required": the peer's words. */
static const char *alert_of(const char *reason) {
  const char *alert = reason == NULL ? NULL : strstr(reason, "alert ");
  return alert == NULL ? NULL : alert + strlen("alert ");
}

mrn_status mrn_tls_explain(mrn_tls *tls, mrn_error *err) {
  unsigned long code = ERR_peek_last_error();
  int reason = ERR_GET_REASON(code);
  const char *alert = alert_of(ERR_reason_error_string(code));
  if (ERR_GET_LIB(code) != ERR_LIB_SSL) return mrn_tls_fail(err, "TLS error");
  if (reason == SSL_R_UNEXPECTED_EOF_WHILE_READING) {
    ERR_clear_error();
    return mrn_fail(err, MRN_CLOSED, "the peer closed the connection without ending TLS");
  }
  if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED && tls->why != NULL) {
    mrn_fail(err, MRN_TLS, "%s", tls->why);
  } else if (alert != NULL) {
    mrn_fail(err, MRN_TLS, "the peer refused: %s", alert);
  } else if (not_tls(reason) && !SSL_is_init_finished(tls->ssl)) {
    mrn_fail(err, MRN_TLS, "the peer does not speak TLS on this port");
  } else {
    mrn_tls_fail(err, "TLS error");
  }
  ERR_clear_error();
  return MRN_TLS;
}
