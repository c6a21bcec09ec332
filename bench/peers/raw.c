/* No client at all: prepared frames on a blocking socket. What it reaches is
 * about what the machine's loopback and the broker allow.
 * Publishes leave by the batch, within the window; deliveries are found by
 * their frames' sizes, never decoded, and each is acked by a frame of its own,
 * all those of one read in one write. */
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "peer.h"

enum { IN_SIZE = 1 << 20, FRAME_MAX = 131072, BATCH_BYTES = 1 << 16 };

static int fd;
static uint8_t in[IN_SIZE];
static size_t in_start, in_end;

static void put16(uint8_t *p, uint16_t v) { v = htons(v), memcpy(p, &v, 2); }
static void put32(uint8_t *p, uint32_t v) { v = htonl(v), memcpy(p, &v, 4); }
static void put64(uint8_t *p, uint64_t v) { v = __builtin_bswap64(v), memcpy(p, &v, 8); }
static uint32_t get32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return ntohl(v);
}
static uint64_t get64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return __builtin_bswap64(v);
}

static void write_all(const uint8_t *p, size_t n) {
  while (n > 0) {
    ssize_t w = send(fd, p, n, MSG_NOSIGNAL);
    if (w <= 0) {
      peer_die("the broker closed the connection");
    }
    p += w;
    n -= (size_t)w;
  }
}

/* The next whole frame that is already here, or NULL. */
static const uint8_t *here(void) {
  size_t n = in_end - in_start;
  if (n < 8) {
    return NULL;
  }
  uint32_t size = get32(in + in_start + 3);
  if (n < (size_t)size + 8) {
    return NULL;
  }
  const uint8_t *p = in + in_start;
  in_start += size + 8;
  return p;
}

static void read_more(void) {
  if (in_start > 0) {
    memmove(in, in + in_start, in_end - in_start);
    in_end -= in_start;
    in_start = 0;
  }
  ssize_t r = recv(fd, in + in_end, IN_SIZE - in_end, 0);
  if (r <= 0) {
    peer_die("the broker closed the connection");
  }
  in_end += (size_t)r;
}

/* Waits for this method; deliveries met on the way are passed over. */
static void expect(uint32_t method) {
  for (;;) {
    const uint8_t *f;
    while ((f = here()) != NULL) {
      if (f[0] == 1 && get32(f + 7) == method) {
        return;
      }
      if (f[0] == 1 && (get32(f + 7) & 0xffff) == 40) {
        peer_die("the broker closed the channel");
      }
    }
    read_more();
  }
}

static uint8_t *octets(uint8_t *p, const void *s, size_t n) {
  memcpy(p, s, n);
  return p + n;
}
static uint8_t *short_string(uint8_t *p, const char *s) {
  *p++ = (uint8_t)strlen(s);
  return octets(p, s, strlen(s));
}
static uint8_t *long_string(uint8_t *p, const char *s, size_t n) {
  put32(p, (uint32_t)n);
  return octets(p + 4, s, n);
}
static uint8_t *begin(uint8_t *at, int type, int channel) {
  at[0] = (uint8_t)type;
  put16(at + 1, (uint16_t)channel);
  return at + 7;
}
static uint8_t *begin_method(uint8_t *at, int channel, uint32_t method) {
  put32(begin(at, 1, channel), method);
  return at + 11;
}
static uint8_t *end(uint8_t *at, uint8_t *p) {
  put32(at + 3, (uint32_t)(p - at - 7));
  *p++ = 0xCE;
  return p;
}
#define METHOD(c, m) ((uint32_t)(c) << 16 | (uint32_t)(m))

static void declare(const char *queue, int bits) {
  uint8_t b[512], *p = begin_method(b, 1, METHOD(50, 10));
  put16(p, 0);
  p = short_string(p + 2, queue);
  *p++ = (uint8_t)bits;
  put32(p, 0);
  write_all(b, (size_t)(end(b, p + 4) - b));
  expect(METHOD(50, 11));
}

static void open_connection(const char *url) {
  char user[128] = "guest", password[128] = "guest", host[256], port[8] = "5672", vhost[256] = "/",
       decoded[256];
  const char *rest = strstr(url, "://");
  rest = rest ? rest + 3 : url;
  if (strchr(rest, '@') != NULL) {
    sscanf(rest, "%127[^:@]:%127[^@]", user, password);
    rest = strchr(rest, '@') + 1;
  }
  sscanf(rest, "%255[^:/]", host);
  sscanf(rest + strlen(host), ":%7[0-9]", port);
  const char *slash = strchr(rest, '/');
  if (slash != NULL && slash[1] != 0) {
    snprintf(vhost, sizeof vhost, "%s", slash + 1);
  }
  snprintf(decoded, sizeof decoded, "%s", strcasecmp(vhost, "%2f") == 0 ? "/" : vhost);

  struct addrinfo *a, hints = {.ai_socktype = SOCK_STREAM};
  if (getaddrinfo(host, port, &hints, &a) != 0) {
    peer_die("unknown host");
  }
  for (fd = -1; a != NULL && fd < 0; a = a->ai_next) {
    fd = socket(a->ai_family, SOCK_STREAM, 0);
    if (connect(fd, a->ai_addr, a->ai_addrlen) < 0) {
      close(fd);
      fd = -1;
    }
  }
  if (fd < 0) {
    peer_die("cannot connect");
  }
  int yes = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);

  uint8_t b[1024], *p;
  write_all((const uint8_t *)"AMQP\0\0\11\1", 8);
  expect(METHOD(10, 10));
  char plain[300];
  int n = snprintf(plain, sizeof plain, "%c%s%c%s", 0, user, 0, password);
  p = begin_method(b, 0, METHOD(10, 11));
  put32(p, 0);
  p = short_string(p + 4, "PLAIN");
  p = long_string(p, plain, (size_t)n);
  p = short_string(p, "en_US");
  write_all(b, (size_t)(end(b, p) - b));
  expect(METHOD(10, 30));
  p = begin_method(b, 0, METHOD(10, 31));
  put16(p, 2047);
  put32(p + 2, FRAME_MAX);
  put16(p + 6, 0);
  write_all(b, (size_t)(end(b, p + 8) - b));
  p = begin_method(b, 0, METHOD(10, 40));
  p = short_string(p, decoded);
  p = octets(p, "\0\0", 2);
  write_all(b, (size_t)(end(b, p) - b));
  expect(METHOD(10, 41));
  p = begin_method(b, 1, METHOD(20, 10));
  *p++ = 0;
  write_all(b, (size_t)(end(b, p) - b));
  expect(METHOD(20, 11));
}

/* ---- publishing --------------------------------------------------------- */

static uint64_t base = 1, next = 1;
static bool *marked;
static uint32_t window;

static void confirmed(uint64_t tag, bool multiple) {
  if (multiple) {
    while (base <= tag) {
      marked[base++ % window] = false;
    }
  } else {
    marked[tag % window] = true;
  }
  while (base < next && marked[base % window]) {
    marked[base++ % window] = false;
  }
}

static void take_confirms(void) {
  const uint8_t *f;
  while ((f = here()) != NULL) {
    if (f[0] == 8) {
      continue;
    }
    if (f[0] != 1 || get32(f + 7) != METHOD(60, 80)) {
      peer_die("something else than a confirm");
    }
    confirmed(get64(f + 11), f[19] & 1);
  }
}

static size_t publish_frames(uint8_t *b, const peer_args *a) {
  uint8_t *p = begin_method(b, 1, METHOD(60, 40)), *at;
  put16(p, 0);
  p = short_string(p + 2, "");
  p = short_string(p, a->queue);
  *p++ = 1; /* mandatory */
  at = p = end(b, p);
  p = begin(at, 2, 1);
  put32(p, 60u << 16);
  put64(p + 4, a->size);
  put16(p + 12, 0x1000);
  p[14] = 2;
  p = end(at, p + 15);
  for (size_t left = a->size; left > 0;) {
    size_t n = left < FRAME_MAX - 8 ? left : FRAME_MAX - 8;
    at = p;
    p = begin(at, 3, 1);
    memset(p, 'x', n);
    p = end(at, p + n);
    left -= n;
  }
  return (size_t)(p - b);
}

static void publish(const peer_args *a, double *trips) {
  uint8_t b[32], *p = begin_method(b, 1, METHOD(85, 10));
  *p++ = 0;
  write_all(b, (size_t)(end(b, p) - b));
  expect(METHOD(85, 11));
  window = trips != NULL ? 1 : a->window;
  marked = calloc(window, sizeof *marked);
  uint8_t *one = malloc(a->size * 2 + 1024);
  size_t size = publish_frames(one, a);
  uint64_t most = BATCH_BYTES / size + 1;
  most = most > window ? window : most;
  uint8_t *batch = malloc(size * most);
  for (uint64_t i = 0; i < most; i++) {
    memcpy(batch + i * size, one, size);
  }
  peer_start();
  while (next <= a->count || base < next) {
    uint64_t n = window - (next - base);
    n = n > most ? most : n;
    n = n > a->count + 1 - next ? a->count + 1 - next : n;
    double started = trips != NULL ? peer_now() : 0;
    if (n > 0) {
      write_all(batch, n * size);
      next += n;
    }
    if (next - base == window || next > a->count) {
      uint64_t before = base;
      while (base == before) {
        read_more();
        take_confirms();
      }
    }
    if (trips != NULL) {
      trips[next - 2] = peer_now() - started;
    }
  }
  peer_report(a->count, trips);
}

/* ---- consuming ---------------------------------------------------------- */

static void consume(const peer_args *a) {
  uint8_t b[512], *p = begin_method(b, 1, METHOD(60, 10));
  put32(p, 0);
  put16(p + 4, (uint16_t)a->window);
  p[6] = 0;
  write_all(b, (size_t)(end(b, p + 7) - b));
  expect(METHOD(60, 11));
  peer_start();
  p = begin_method(b, 1, METHOD(60, 20));
  put16(p, 0);
  p = short_string(p + 2, a->queue);
  p = short_string(p, "");
  *p++ = 0;
  put32(p, 0);
  write_all(b, (size_t)(end(b, p + 4) - b));
  expect(METHOD(60, 21));

  static uint8_t acks[21 * 65536];
  uint64_t taken = 0, tag = 0, left = 0;
  while (taken < a->count) {
    const uint8_t *f;
    size_t n = 0;
    while (taken < a->count && (f = here()) != NULL) {
      if (f[0] == 1 && get32(f + 7) == METHOD(60, 60)) {
        tag = get64(f + 12 + f[11]);
      } else if (f[0] == 2) {
        left = get64(f + 11);
      } else if (f[0] == 3) {
        left -= get32(f + 3);
      } else {
        continue;
      }
      if (f[0] == 1 || left > 0) {
        continue;
      }
      uint8_t *ack = acks + n;
      p = begin_method(ack, 1, METHOD(60, 80));
      put64(p, tag);
      p[8] = 0;
      n = (size_t)(end(ack, p + 9) - acks);
      taken++;
    }
    write_all(acks, n);
    if (taken < a->count) {
      read_more();
    }
  }
  declare(a->queue, 1);
  peer_report(a->count, NULL);
}

int main(int argc, char **argv) {
  peer_args a = peer_parse(argc, argv);
  open_connection(a.url);
  declare(a.queue, 2);
  if (strcmp(a.mode, "publish") == 0) {
    publish(&a, NULL);
  } else if (strcmp(a.mode, "roundtrip") == 0) {
    publish(&a, malloc(a.count * sizeof(double)));
  } else if (strcmp(a.mode, "consume") == 0) {
    consume(&a);
  } else {
    peer_die("unknown mode");
  }
  return 0;
}
