/* Flags of descriptors. */
#ifndef MOONRABBIT_NET_DESCRIPTOR_H
#define MOONRABBIT_NET_DESCRIPTOR_H

#include <stdbool.h>

/* A non-blocking stream socket that children do not inherit and that never raises SIGPIPE where
 * the system has a socket option for that; -1 and errno. */
int mrn_socket(int family);
/* Sets both flags on a descriptor that something else made. */
bool mrn_set_flags(int fd);
/* A non-blocking pipe: ends[0] reads, ends[1] writes. */
bool mrn_pipe(int ends[2]);
/* No delay of small segments; nothing happens on a unix socket. */
void mrn_no_delay(int fd, int family);

#endif
