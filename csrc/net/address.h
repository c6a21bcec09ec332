/* One place to connect to: IPv4, IPv6 or unix. */
#ifndef MOONRABBIT_NET_ADDRESS_H
#define MOONRABBIT_NET_ADDRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

#include "net/result.h"

#define MRN_ADDRESS_TEXT 160

typedef struct {
  struct sockaddr_storage storage;
  socklen_t length;
} mrn_address;

/* Is `host` an IPv4 or IPv6 address in figures (a scope and brackets allowed)? Never asks a
 * resolver. `address` may be NULL. */
bool mrn_address_literal(const char *host, int port, mrn_address *address);
/* "localhost" is both loopback addresses, IPv6 first, whatever /etc/hosts says. */
size_t mrn_address_localhost(int port, mrn_address addresses[2]);
/* MRN_REFUSED when the path is too long for the system. */
mrn_status mrn_address_unix(const char *path, size_t length, mrn_address *address, mrn_error *err);
/* "127.0.0.1:5672", "[::1]:5672", "unix:/run/broker.sock"; `text` has MRN_ADDRESS_TEXT bytes. */
void mrn_address_format(const mrn_address *address, char *text);
/* 0 for a unix socket. */
int mrn_address_port(const mrn_address *address);

#endif
