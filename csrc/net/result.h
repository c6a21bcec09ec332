/* What every operation of csrc/net answers, and why it failed. */
#ifndef MOONRABBIT_NET_RESULT_H
#define MOONRABBIT_NET_RESULT_H

#include <stdbool.h>

typedef enum {
  MRN_OK = 0,
  MRN_AGAIN,   /* not now: wait for the descriptor */
  MRN_FULL,    /* the engine has no room until its events are taken */
  MRN_REFUSED, /* nothing there, or no way to get there */
  MRN_TIMEOUT, /* the network gave up */
  MRN_TLS,     /* a certificate, a protocol version, a context that cannot be built */
  MRN_CLOSED,  /* by the peer or by us */
  MRN_DNS      /* no such name, or nobody who could tell */
} mrn_status;

typedef struct {
  bool temporary; /* trying again may help */
  char text[384];
} mrn_error;

/* "refused", "closed" ... as the runtime interface names them. */
const char *mrn_status_name(mrn_status status);

#if defined(__GNUC__)
#define MRN_PRINTF(text, rest) __attribute__((format(printf, text, rest)))
#define MRN_UNUSED __attribute__((unused))
#else
#define MRN_PRINTF(text, rest)
#define MRN_UNUSED
#endif

/* Writes the text, cut to fit, and returns the status that it was given. */
mrn_status mrn_fail(mrn_error *err, mrn_status status, const char *format, ...) MRN_PRINTF(3, 4);
/* The same with the system's words for `code`, an errno, in the lower case of our own texts. */
mrn_status mrn_fail_errno(mrn_error *err, mrn_status status, int code);
/* Puts `prefix` and a colon in front of the text. */
void mrn_error_prefix(mrn_error *err, const char *prefix);

#endif
