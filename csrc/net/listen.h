/* The side that waits: for specs, and for small servers of the layers above. */
#ifndef MOONRABBIT_NET_LISTEN_H
#define MOONRABBIT_NET_LISTEN_H

#include "net/address.h"
#include "net/result.h"

/* A listening descriptor, or -1. Port 0: any free one. A unix socket that nobody listens on any more
 * gives its path away. */
int mrn_listen(const mrn_address *address, mrn_error *err);
/* The port that it listens on; 0 for a unix socket. */
int mrn_listen_port(int fd);
/* MRN_OK: *accepted is the new descriptor. */
mrn_status mrn_accept(int fd, int *accepted, mrn_error *err);

#endif
