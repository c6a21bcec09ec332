#include "net/address.h"

#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/un.h>

static void set_port(mrn_address *address, int port) {
  if (address->storage.ss_family == AF_INET6) {
    ((struct sockaddr_in6 *)&address->storage)->sin6_port = htons((uint16_t)port);
  } else {
    ((struct sockaddr_in *)&address->storage)->sin_port = htons((uint16_t)port);
  }
}

static bool parse(const char *host, int port, mrn_address *address) {
  struct addrinfo hints, *list = NULL;
  memset(&hints, 0, sizeof hints);
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST;
  if (getaddrinfo(host, NULL, &hints, &list) != 0 || list == NULL) return false;
  bool fits = list->ai_addrlen <= sizeof address->storage;
  if (fits) {
    memset(address, 0, sizeof *address);
    memcpy(&address->storage, list->ai_addr, list->ai_addrlen);
    address->length = list->ai_addrlen;
    set_port(address, port);
  }
  freeaddrinfo(list);
  return fits;
}

/* "[::1]" -> "::1"; false when that cannot be an address. */
static bool strip_brackets(const char *host, char *bare, size_t size) {
  size_t length = strlen(host);
  if (length >= 2 && host[0] == '[' && host[length - 1] == ']') {
    host++;
    length -= 2;
  }
  if (length == 0 || length >= size) return false;
  memcpy(bare, host, length);
  bare[length] = '\0';
  return true;
}

/* inet_aton's old forms ("1", "127.1") are names to us: only what looks like an address is one. */
static bool looks_numeric(const char *host) {
  int dots = 0;
  if (strchr(host, ':') != NULL) return true;
  for (; *host != '\0'; host++) {
    if (*host == '.')
      dots++;
    else if (*host < '0' || *host > '9')
      return false;
  }
  return dots == 3;
}

bool mrn_address_literal(const char *host, int port, mrn_address *address) {
  char bare[96];
  mrn_address parsed;
  if (!strip_brackets(host, bare, sizeof bare) || !looks_numeric(bare)) return false;
  if (!parse(bare, port, &parsed)) return false;
  if (address != NULL) *address = parsed;
  return true;
}

size_t mrn_address_localhost(int port, mrn_address addresses[2]) {
  size_t count = 0;
  if (parse("::1", port, &addresses[count])) count++;
  if (parse("127.0.0.1", port, &addresses[count])) count++;
  return count;
}

mrn_status mrn_address_unix(const char *path, size_t length, mrn_address *address, mrn_error *err) {
  struct sockaddr_un *sun = (struct sockaddr_un *)&address->storage;
  memset(address, 0, sizeof *address);
  if (length == 0 || length >= sizeof sun->sun_path) {
    mrn_fail(err, MRN_REFUSED, "the path of a unix socket has 1 to %d bytes, this one has %d",
             (int)sizeof sun->sun_path - 1, (int)length);
    err->temporary = false;
    return MRN_REFUSED;
  }
  sun->sun_family = AF_UNIX;
  memcpy(sun->sun_path, path, length);
  address->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
  return MRN_OK;
}

void mrn_address_format(const mrn_address *address, char *text) {
  const struct sockaddr *sa = (const struct sockaddr *)&address->storage;
  char host[80] = "?";
  if (sa->sa_family == AF_UNIX) {
    snprintf(text, MRN_ADDRESS_TEXT, "unix:%s", ((const struct sockaddr_un *)sa)->sun_path);
    return;
  }
  getnameinfo(sa, address->length, host, sizeof host, NULL, 0, NI_NUMERICHOST);
  snprintf(text, MRN_ADDRESS_TEXT, sa->sa_family == AF_INET6 ? "[%s]:%d" : "%s:%d", host,
           mrn_address_port(address));
}

int mrn_address_port(const mrn_address *address) {
  switch (address->storage.ss_family) {
    case AF_INET: return ntohs(((const struct sockaddr_in *)&address->storage)->sin_port);
    case AF_INET6: return ntohs(((const struct sockaddr_in6 *)&address->storage)->sin6_port);
    default: return 0;
  }
}
