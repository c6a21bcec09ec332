/*
 * Names to addresses without blocking. getaddrinfo runs in one of a few detached threads; a lookup
 * is shared between its asker and its thread, and whoever lets go last frees it. So an asker that
 * loses interest never waits, and a resolver that hangs for a minute hurts nobody.
 */
#ifndef MOONRABBIT_NET_RESOLVE_H
#define MOONRABBIT_NET_RESOLVE_H

#include "net/address.h"
#include "net/result.h"

typedef struct mrn_lookup mrn_lookup;

/* NULL and err: no thread, no descriptor, no memory, a name that cannot be one. */
mrn_lookup *mrn_lookup_start(const char *host, int port, mrn_error *err);
/* Readable once the answer is there; -1 when it was there at once. */
int mrn_lookup_fd(const mrn_lookup *lookup);
/* MRN_OK: *addresses and *count, which belong to the lookup. MRN_AGAIN; MRN_DNS. */
mrn_status mrn_lookup_result(mrn_lookup *lookup, const mrn_address **addresses, size_t *count,
                             mrn_error *err);
/* Lets go; NULL is allowed. */
void mrn_lookup_free(mrn_lookup *lookup);

#endif
