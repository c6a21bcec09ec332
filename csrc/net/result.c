#include "net/result.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *mrn_status_name(mrn_status status) {
  switch (status) {
    case MRN_OK: return "ok";
    case MRN_AGAIN: return "again";
    case MRN_FULL: return "full";
    case MRN_REFUSED: return "refused";
    case MRN_TIMEOUT: return "timeout";
    case MRN_TLS: return "tls";
    case MRN_CLOSED: return "closed";
    case MRN_DNS: return "dns";
  }
  return "closed";
}

mrn_status mrn_fail(mrn_error *err, mrn_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(err->text, sizeof err->text, format, arguments);
  va_end(arguments);
  err->temporary = status != MRN_TLS;
  return status;
}

/* strerror_r has two signatures; _Generic takes whichever the C library has. */
MRN_UNUSED static const char *gnu_words(const char *result, const char *buffer) {
  (void)buffer;
  return result;
}
MRN_UNUSED static const char *posix_words(int result, const char *buffer) {
  return result == 0 ? buffer : "unknown error";
}
#define ERROR_WORDS(code, buffer) \
  _Generic(strerror_r(0, buffer, 0), char *: gnu_words, int: posix_words)(           \
      strerror_r((code), buffer, sizeof(buffer)), buffer)

mrn_status mrn_fail_errno(mrn_error *err, mrn_status status, int code) {
  char buffer[128] = "";
  const char *words = ERROR_WORDS(code, buffer);
  mrn_fail(err, status, "%s", words);
  if (isupper((unsigned char)err->text[0]) && islower((unsigned char)err->text[1])) {
    err->text[0] = (char)tolower((unsigned char)err->text[0]);
  }
  return status;
}

void mrn_error_prefix(mrn_error *err, const char *prefix) {
  char whole[sizeof err->text];
  size_t used = (size_t)snprintf(whole, sizeof whole, "%s: ", prefix);
  if (used >= sizeof whole) return;
  size_t room = sizeof whole - used - 1, length = strlen(err->text);
  if (length > room) length = room;
  memcpy(whole + used, err->text, length);
  whole[used + length] = '\0';
  memcpy(err->text, whole, used + length + 1);
}
