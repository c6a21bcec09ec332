/* A broker that does nothing, quickly: the other end of the benchmarks.
 *
 * It speaks enough of AMQP 0-9-1 for a client to believe it: the handshake,
 * channels, declarations, confirms, deliveries under a prefetch, heartbeats.
 * It routes nothing and keeps nothing.
 *
 *  - What is published is counted and thrown away. On a confirm channel all
 *    that one read brought is settled by one `basic.ack multiple`.
 *  - A queue whose name ends in `bench-<size>` never runs dry: its consumers
 *    get messages of <size> bytes as fast as they take them, within their
 *    prefetch. `bench-<size>-<count>` gives each consumer <count> of them. Where
 *    the name begins with `ids-` each has a message id of its own.
 *    Every other queue is empty.
 *  - A delivery tag that is not outstanding closes the channel with 406, as a
 *    real broker does: a client that acks wrongly cannot look fast.
 *
 * Theory of operation. One thread, one epoll. A socket is read into one
 * shared input area; only the incomplete frame at its end is copied to the
 * connection. All that a turn has to say is gathered in one shared output
 * area and leaves in one send; only what the socket refuses is copied to the
 * connection, which then neither reads nor delivers until it has left. So an
 * idle connection holds no buffer, and no allocation is made per message.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
  FRAME_METHOD = 1,
  FRAME_HEADER = 2,
  FRAME_BODY = 3,
  FRAME_HEARTBEAT = 8,
  FRAME_END = 0xCE,
  FRAME_OVERHEAD = 8,
  FRAME_MIN = 4096,
  OUT_SIZE = 1 << 18,
  TURN_BUDGET = 1 << 20,   /* bytes delivered to one connection in one turn */
  ID_SIZE = 16,            /* digits of a message id */
  UNLIMITED_ACKING = 65535 /* an acking consumer without prefetch */
};

#define METHOD(c, m) ((uint32_t)(c) << 16 | (uint32_t)(m))

typedef struct consumer consumer;
typedef struct channel channel;
typedef struct connection connection;

struct consumer {
  consumer *next;
  char tag[256];
  bool no_ack;
  uint32_t prefetch; /* 0: no limit of its own */
  uint32_t unacked;
  uint64_t left;  /* messages this consumer may still get */
  uint8_t *block; /* one whole delivery, frames and all */
  size_t block_size;
  size_t tag_offset; /* of the delivery tag in it */
  size_t id_offset;  /* of the message id, whose digits are the tag's; 0: none */
};

struct channel {
  connection *conn;
  channel *next_ready;
  uint16_t id;
  bool ready;       /* on the connection's ready list */
  bool unconfirmed; /* on this turn's list of confirms to send */
  bool confirm;
  bool flow;
  bool closing;
  uint8_t content; /* 0 none, 1 header expected, 2 body expected */
  uint64_t content_left;
  uint64_t published;
  uint32_t next_prefetch; /* for consumers to come */
  uint32_t prefetch;      /* shared by the channel's consumers */
  uint32_t unacked;
  consumer *consumers;
  /* Outstanding deliveries: slot (tag & mask) for base <= tag < next_tag. */
  consumer **window;
  uint64_t window_size;
  uint64_t base;
  uint64_t next_tag;
};

struct connection {
  connection *next, *prev;
  int fd;
  uint8_t state; /* the S_* below */
  bool dead;
  uint32_t events; /* what epoll is asked for */
  uint16_t heartbeat;
  uint32_t frame_max;
  time_t last_in, last_out;
  uint8_t *in; /* an incomplete frame */
  size_t in_used, in_size;
  uint8_t *out; /* what the socket refused */
  size_t out_start, out_used, out_size;
  channel **channels;
  uint32_t channels_size;
  channel *ready_head, *ready_tail;
};

enum { S_HEADER, S_START_OK, S_TUNE_OK, S_OPEN, S_RUNNING, S_CLOSING };

static struct {
  int port;
  uint32_t channel_max, frame_max, heartbeat;
  size_t read_size;
  int send_buffer;
} opt = {0, 2047, 131072, 60, 131072, 0};

static int epoll_fd;
static time_t now;
static connection *connections;
static uint8_t *in_area;
static size_t in_area_size;
static uint8_t out_area[OUT_SIZE];
static size_t out_used;
static connection *out_owner;
static channel *confirms[65536];
static unsigned confirms_used;
static unsigned names_made;

static void fatal(const char *what) {
  perror(what);
  exit(1);
}

static void *must(void *p) {
  if (p == NULL) {
    fatal("null_broker: memory");
  }
  return p;
}

static time_t monotonic(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return t.tv_sec;
}

/* ---- numbers ------------------------------------------------------------ */

static uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t get32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return __builtin_bswap32(v);
}
static uint64_t get64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return __builtin_bswap64(v);
}
static void put16(uint8_t *p, uint16_t v) {
  p[0] = (uint8_t)(v >> 8);
  p[1] = (uint8_t)v;
}
static void put32(uint8_t *p, uint32_t v) {
  v = __builtin_bswap32(v);
  memcpy(p, &v, 4);
}
static void put64(uint8_t *p, uint64_t v) {
  v = __builtin_bswap64(v);
  memcpy(p, &v, 8);
}

/* ---- output ------------------------------------------------------------- */

/* A client that does not read what it is owed is not read either. */
static void arm(connection *c) {
  bool want = c->out_used > 0 || c->ready_head != NULL;
  uint32_t events = (want ? EPOLLOUT : 0u) | (c->out_used > 0 ? 0u : EPOLLIN);
  if (events != c->events) {
    c->events = events;
    struct epoll_event e = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
  }
}

static size_t send_some(connection *c, const uint8_t *p, size_t n) {
  size_t done = 0;
  while (done < n) {
    ssize_t w = send(c->fd, p + done, n - done, MSG_NOSIGNAL);
    if (w > 0) {
      done += (size_t)w;
      c->last_out = now;
    } else if (w < 0 && errno == EINTR) {
      continue;
    } else {
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        c->dead = true;
      }
      break;
    }
  }
  return done;
}

static void keep(connection *c, const uint8_t *p, size_t n) {
  if (c->out_used + n > c->out_size) {
    c->out_size = (c->out_used + n) * 2;
    c->out = must(realloc(c->out, c->out_size));
  }
  memcpy(c->out + c->out_used, p, n);
  c->out_used += n;
}

static void flush(void) {
  connection *c = out_owner;
  if (out_used > 0 && c != NULL && !c->dead) {
    size_t done = c->out_used > 0 ? 0 : send_some(c, out_area, out_used);
    if (done < out_used && !c->dead) {
      keep(c, out_area + done, out_used - done);
    }
  }
  out_used = 0;
}

static uint8_t *reserve(connection *c, size_t n) {
  if (out_owner != c || out_used + n > OUT_SIZE) {
    flush();
    out_owner = c;
  }
  return out_area + out_used;
}

static void emit(connection *c, const uint8_t *p, size_t n) {
  while (n > 0) {
    size_t part = n < OUT_SIZE ? n : OUT_SIZE;
    memcpy(reserve(c, part), p, part);
    out_used += part;
    p += part;
    n -= part;
  }
}

static void flush_kept(connection *c) {
  if (c->out_used > c->out_start) {
    c->out_start += send_some(c, c->out + c->out_start, c->out_used - c->out_start);
  }
  if (c->out_start == c->out_used) {
    free(c->out);
    c->out = NULL;
    c->out_start = c->out_used = c->out_size = 0;
  }
}

/* Writes one method frame. The format's letters: b octet, s short, l long,
 * q long long, S short string, L long string, T an empty table. */
static size_t method_frame(uint8_t *at, uint16_t ch, uint32_t method, const char *format,
                           va_list args) {
  uint8_t *p = at + 7;
  put32(p, method);
  p += 4;
  for (; *format; format++) {
    switch (*format) {
      case 'b': *p++ = (uint8_t)va_arg(args, int); break;
      case 's':
        put16(p, (uint16_t)va_arg(args, int));
        p += 2;
        break;
      case 'l':
        put32(p, va_arg(args, uint32_t));
        p += 4;
        break;
      case 'q':
        put64(p, va_arg(args, uint64_t));
        p += 8;
        break;
      case 'T':
        put32(p, 0);
        p += 4;
        break;
      case 'S':
      case 'L': {
        const char *s = va_arg(args, const char *);
        size_t n = strlen(s);
        if (*format == 'S') {
          *p++ = (uint8_t)n;
        } else {
          put32(p, (uint32_t)n);
          p += 4;
        }
        memcpy(p, s, n);
        p += n;
        break;
      }
      default: abort();
    }
  }
  at[0] = FRAME_METHOD;
  put16(at + 1, ch);
  put32(at + 3, (uint32_t)(p - at - 7));
  *p++ = FRAME_END;
  return (size_t)(p - at);
}

static void reply(connection *c, uint16_t ch, uint32_t method, const char *format, ...) {
  va_list args;
  va_start(args, format);
  uint8_t *at = reserve(c, 2048);
  out_used += method_frame(at, ch, method, format, args);
  va_end(args);
}

static size_t build_frame(uint8_t *at, uint16_t ch, uint32_t method, const char *format, ...) {
  va_list args;
  va_start(args, format);
  size_t n = method_frame(at, ch, method, format, args);
  va_end(args);
  return n;
}

static void send_start(connection *c) {
  static const char *capabilities[] = {
      "publisher_confirms",           "exchange_exchange_bindings", "basic.nack",
      "consumer_cancel_notify",       "connection.blocked",         "consumer_priorities",
      "authentication_failure_close", "per_consumer_qos",           "direct_reply_to"};
  static const char *facts[][2] = {
      {"product", "null broker"}, {"version", "3.10.8"}, {"platform", "C"}};
  uint8_t table[1024];
  uint8_t *p = table + 4;
  static const char name[] = "capabilities";
  *p++ = sizeof name - 1;
  memcpy(p, name, sizeof name - 1);
  p += sizeof name - 1;
  *p++ = 'F';
  uint8_t *inner = p;
  p += 4;
  for (size_t i = 0; i < sizeof capabilities / sizeof *capabilities; i++) {
    size_t n = strlen(capabilities[i]);
    *p++ = (uint8_t)n;
    memcpy(p, capabilities[i], n);
    p += n;
    *p++ = 't';
    *p++ = 1;
  }
  put32(inner, (uint32_t)(p - inner - 4));
  for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
    size_t n = strlen(facts[i][0]);
    *p++ = (uint8_t)n;
    memcpy(p, facts[i][0], n);
    p += n;
    *p++ = 'S';
    n = strlen(facts[i][1]);
    put32(p, (uint32_t)n);
    memcpy(p + 4, facts[i][1], n);
    p += 4 + n;
  }
  put32(table, (uint32_t)(p - table - 4));
  size_t table_size = (size_t)(p - table);

  static const char mechanisms[] = "PLAIN AMQPLAIN EXTERNAL";
  static const char locales[] = "en_US";
  uint8_t *at = reserve(c, 2048);
  p = at + 7;
  put32(p, METHOD(10, 10));
  p += 4;
  *p++ = 0;
  *p++ = 9;
  memcpy(p, table, table_size);
  p += table_size;
  put32(p, sizeof mechanisms - 1);
  memcpy(p + 4, mechanisms, sizeof mechanisms - 1);
  p += 4 + sizeof mechanisms - 1;
  put32(p, sizeof locales - 1);
  memcpy(p + 4, locales, sizeof locales - 1);
  p += 4 + sizeof locales - 1;
  at[0] = FRAME_METHOD;
  put16(at + 1, 0);
  put32(at + 3, (uint32_t)(p - at - 7));
  *p++ = FRAME_END;
  out_used += (size_t)(p - at);
}

static void connection_error(connection *c, int code, const char *text) {
  if (c->state == S_CLOSING) {
    return;
  }
  fprintf(stderr, "null_broker: connection error %d %s\n", code, text);
  reply(c, 0, METHOD(10, 50), "sSss", code, text, 0, 0);
  c->state = S_CLOSING;
}

/* ---- input -------------------------------------------------------------- */

typedef struct {
  const uint8_t *p, *end;
  bool bad;
} reader;

static bool has(reader *r, size_t n) {
  if ((size_t)(r->end - r->p) < n) {
    r->bad = true;
    r->p = r->end;
    return false;
  }
  return true;
}
static unsigned r_octet(reader *r) { return has(r, 1) ? *r->p++ : 0; }
static uint16_t r_short(reader *r) { return has(r, 2) ? (r->p += 2, get16(r->p - 2)) : 0; }
static uint32_t r_long(reader *r) { return has(r, 4) ? (r->p += 4, get32(r->p - 4)) : 0; }
static uint64_t r_longlong(reader *r) { return has(r, 8) ? (r->p += 8, get64(r->p - 8)) : 0; }
static void r_string(reader *r, char out[256]) {
  size_t n = r_octet(r);
  if (!has(r, n)) {
    n = 0;
  }
  memcpy(out, r->p, n);
  out[n] = 0;
  r->p += n;
}

/* ---- consumers ---------------------------------------------------------- */

static uint64_t credit(const channel *ch, const consumer *k) {
  if (k->no_ack) {
    return k->left;
  }
  uint32_t most = k->prefetch > 0 ? k->prefetch : UNLIMITED_ACKING;
  uint64_t limit = most > k->unacked ? most - k->unacked : 0;
  if (ch->prefetch > 0) {
    uint64_t shared = ch->prefetch > ch->unacked ? ch->prefetch - ch->unacked : 0;
    limit = shared < limit ? shared : limit;
  }
  return k->left < limit ? k->left : limit;
}

static void make_ready(channel *ch) {
  if (ch->ready || ch->consumers == NULL || !ch->flow || ch->closing) {
    return;
  }
  connection *c = ch->conn;
  ch->ready = true;
  ch->next_ready = NULL;
  if (c->ready_tail != NULL) {
    c->ready_tail->next_ready = ch;
  } else {
    c->ready_head = ch;
  }
  c->ready_tail = ch;
}

static void window_grow(channel *ch) {
  uint64_t size = ch->window_size ? ch->window_size * 2 : 512;
  consumer **grown = must(calloc(size, sizeof *grown));
  for (uint64_t t = ch->base; t < ch->next_tag; t++) {
    grown[t & (size - 1)] = ch->window[t & (ch->window_size - 1)];
  }
  free(ch->window);
  ch->window = grown;
  ch->window_size = size;
}

/* Delivers to one consumer; returns the bytes written. */
static void put_digits(uint8_t *p, uint64_t n) {
  for (int i = ID_SIZE - 1; i >= 0; i--, n /= 10) {
    p[i] = (uint8_t)('0' + n % 10);
  }
}

static size_t deliver(channel *ch, consumer *k, size_t budget) {
  connection *c = ch->conn;
  uint64_t n = credit(ch, k);
  size_t bytes = 0;
  while (n > 0 && bytes < budget && c->out_used == 0 && !c->dead) {
    if (!k->no_ack) {
      if (ch->next_tag - ch->base >= ch->window_size) {
        window_grow(ch);
      }
      ch->window[ch->next_tag & (ch->window_size - 1)] = k;
      k->unacked++;
      ch->unacked++;
    } else if (ch->base == ch->next_tag) {
      ch->base++;
    } else {
      if (ch->next_tag - ch->base >= ch->window_size) {
        window_grow(ch);
      }
      ch->window[ch->next_tag & (ch->window_size - 1)] = NULL;
    }
    if (k->id_offset) {
      put_digits(k->block + k->id_offset, ch->next_tag);
    }
    put64(k->block + k->tag_offset, ch->next_tag++);
    emit(c, k->block, k->block_size);
    bytes += k->block_size;
    k->left--;
    n--;
  }
  return bytes;
}

/* The first consumer to be served becomes the last. */
static void rotate(channel *ch) {
  consumer *first = ch->consumers;
  if (first != NULL && first->next != NULL) {
    consumer *last = first->next;
    while (last->next != NULL) {
      last = last->next;
    }
    ch->consumers = first->next;
    first->next = NULL;
    last->next = first;
  }
}

static void pump(connection *c) {
  size_t budget = TURN_BUDGET;
  while (c->ready_head != NULL && budget > 0 && c->out_used == 0 && !c->dead) {
    channel *ch = c->ready_head;
    c->ready_head = ch->next_ready;
    if (c->ready_head == NULL) {
      c->ready_tail = NULL;
    }
    ch->ready = false;
    for (consumer *k = ch->consumers; k != NULL; k = k->next) {
      size_t bytes = deliver(ch, k, budget);
      budget -= bytes < budget ? bytes : budget;
    }
    rotate(ch);
    for (consumer *k = ch->consumers; k != NULL; k = k->next) {
      if (credit(ch, k) > 0) {
        make_ready(ch);
        break;
      }
    }
  }
}

static void consumer_free(consumer *k) {
  free(k->block);
  free(k);
}

/* The consumer's deliveries stay outstanding on the channel. */
static void cancel(channel *ch, const char *tag) {
  for (consumer **at = &ch->consumers; *at != NULL; at = &(*at)->next) {
    consumer *k = *at;
    if (strcmp(k->tag, tag) == 0) {
      *at = k->next;
      static consumer gone; /* takes the blame for what is still unacked */
      for (uint64_t t = ch->base; t < ch->next_tag; t++) {
        consumer **slot = &ch->window[t & (ch->window_size - 1)];
        if (*slot == k) {
          *slot = &gone;
        }
      }
      consumer_free(k);
      return;
    }
  }
}

/* Sets *size and *count from a queue's name; false for an ordinary queue. */
static bool bottomless(const char *queue, uint64_t *size, uint64_t *count) {
  const char *found = NULL;
  for (const char *s = strstr(queue, "bench-"); s; s = strstr(s + 1, "bench-")) {
    found = s;
  }
  if (found == NULL || found[6] < '0' || found[6] > '9') {
    return false;
  }
  char *rest;
  *size = strtoull(found + 6, &rest, 10);
  *count = UINT64_MAX;
  if (*rest == '-' && rest[1] >= '0' && rest[1] <= '9') {
    *count = strtoull(rest + 1, &rest, 10);
  }
  return *rest == 0 && *size <= (64u << 20);
}

static void prepare(channel *ch, consumer *k, const char *queue, uint64_t size) {
  size_t most = ch->conn->frame_max - FRAME_OVERHEAD;
  size_t frames = size / most + 1;
  k->block = must(malloc(2048 + size + frames * FRAME_OVERHEAD));
  uint8_t *p = k->block;
  k->tag_offset = 7 + 4 + 1 + strlen(k->tag);
  p += build_frame(p, ch->id, METHOD(60, 60), "SqbSS", k->tag, (uint64_t)0, 0, "", queue);
  p[0] = FRAME_HEADER;
  put16(p + 1, ch->id);
  bool ids = strncmp(queue, "ids-", 4) == 0;
  put32(p + 3, 15 + (ids ? 1 + ID_SIZE : 0));
  put16(p + 7, 60);
  put16(p + 9, 0);
  put64(p + 11, size);
  put16(p + 19, ids ? 0x1080 : 0x1000); /* delivery mode: persistent; message id */
  p[21] = 2;
  p += 22;
  k->id_offset = 0;
  if (ids) {
    *p++ = ID_SIZE;
    k->id_offset = (size_t)(p - k->block);
    p += ID_SIZE;
  }
  *p++ = FRAME_END;
  for (uint64_t left = size; left > 0;) {
    size_t n = left < most ? left : most;
    p[0] = FRAME_BODY;
    put16(p + 1, ch->id);
    put32(p + 3, (uint32_t)n);
    memset(p + 7, 'x', n);
    p[7 + n] = FRAME_END;
    p += n + FRAME_OVERHEAD;
    left -= n;
  }
  k->block_size = (size_t)(p - k->block);
}

/* ---- channels ----------------------------------------------------------- */

static channel *find(connection *c, uint16_t id) {
  return id < c->channels_size ? c->channels[id] : NULL;
}

static bool channel_open(connection *c, uint16_t id) {
  if (id == 0 || find(c, id) != NULL || (opt.channel_max > 0 && id > opt.channel_max)) {
    return false;
  }
  if (id >= c->channels_size) {
    uint32_t size = c->channels_size ? c->channels_size : 4;
    while (size <= id) {
      size *= 2;
    }
    c->channels = must(realloc(c->channels, size * sizeof *c->channels));
    memset(c->channels + c->channels_size, 0, (size - c->channels_size) * sizeof *c->channels);
    c->channels_size = size;
  }
  channel *ch = must(calloc(1, sizeof *ch));
  ch->conn = c;
  ch->id = id;
  ch->flow = true;
  ch->base = ch->next_tag = 1;
  c->channels[id] = ch;
  return true;
}

static void drop_confirm(channel *ch) {
  for (unsigned i = 0; ch->unconfirmed && i < confirms_used; i++) {
    if (confirms[i] == ch) {
      confirms[i] = confirms[--confirms_used];
      ch->unconfirmed = false;
    }
  }
}

static void channel_free(channel *ch) {
  connection *c = ch->conn;
  channel *kept_head = NULL, *kept_tail = NULL;
  if (ch->ready) {
    for (channel *k = c->ready_head, *next; k != NULL; k = next) {
      next = k->next_ready;
      if (k != ch) {
        k->next_ready = NULL;
        if (kept_tail != NULL) {
          kept_tail->next_ready = k;
        } else {
          kept_head = k;
        }
        kept_tail = k;
      }
    }
    c->ready_head = kept_head;
    c->ready_tail = kept_tail;
  }
  drop_confirm(ch);
  while (ch->consumers != NULL) {
    consumer *k = ch->consumers;
    ch->consumers = k->next;
    consumer_free(k);
  }
  free(ch->window);
  c->channels[ch->id] = NULL;
  free(ch);
}

static void channel_error(channel *ch, int code, const char *text, uint32_t by) {
  fprintf(stderr, "null_broker: channel error %d %s\n", code, text);
  ch->closing = true;
  reply(ch->conn, ch->id, METHOD(20, 40), "sSss", code, text, (int)(by >> 16), (int)(by & 0xffff));
}

static void settle_one(channel *ch, uint64_t tag) {
  consumer **slot = &ch->window[tag & (ch->window_size - 1)];
  if (*slot != NULL) {
    if ((*slot)->unacked > 0) {
      (*slot)->unacked--;
    }
    ch->unacked--;
    *slot = NULL;
  }
}

static void settle(channel *ch, uint64_t tag, bool multiple, uint32_t by) {
  if (multiple && tag == 0) {
    tag = ch->next_tag - 1;
  } else if (tag < ch->base || tag >= ch->next_tag ||
             ch->window[tag & (ch->window_size - 1)] == NULL) {
    channel_error(ch, 406, "PRECONDITION_FAILED - unknown delivery tag", by);
    return;
  }
  if (multiple) {
    for (uint64_t t = ch->base; t <= tag; t++) {
      settle_one(ch, t);
    }
    ch->base = tag + 1;
  } else {
    settle_one(ch, tag);
  }
  while (ch->base < ch->next_tag && ch->window[ch->base & (ch->window_size - 1)] == NULL) {
    ch->base++;
  }
  make_ready(ch);
}

/* One content is complete. */
static void published(channel *ch) {
  ch->content = 0;
  ch->published++;
  if (ch->confirm && !ch->unconfirmed) {
    ch->unconfirmed = true;
    confirms[confirms_used++] = ch;
  }
}

static void send_confirms(void) {
  for (unsigned i = 0; i < confirms_used; i++) {
    channel *ch = confirms[i];
    ch->unconfirmed = false;
    uint8_t *p = reserve(ch->conn, 21);
    p[0] = FRAME_METHOD;
    put16(p + 1, ch->id);
    put32(p + 3, 13);
    put32(p + 7, METHOD(60, 80));
    put64(p + 11, ch->published);
    p[19] = 1;
    p[20] = FRAME_END;
    out_used += 21;
  }
  confirms_used = 0;
}

static void on_consume(channel *ch, reader *r) {
  char queue[256], tag[256];
  r_short(r);
  r_string(r, queue);
  r_string(r, tag);
  unsigned bits = r_octet(r);
  if (r->bad) {
    return;
  }
  if (tag[0] == 0) {
    snprintf(tag, sizeof tag, "amq.ctag-%u", ++names_made);
  }
  if (!(bits & 8)) {
    reply(ch->conn, ch->id, METHOD(60, 21), "S", tag);
  }
  uint64_t size = 0, count = 0;
  if (!bottomless(queue, &size, &count)) {
    size = count = 0;
  }
  consumer *k = must(calloc(1, sizeof *k));
  strcpy(k->tag, tag);
  k->no_ack = (bits & 2) != 0;
  k->prefetch = ch->next_prefetch;
  k->left = count;
  prepare(ch, k, queue, size);
  k->next = ch->consumers;
  ch->consumers = k;
  make_ready(ch);
}

static void on_declare(connection *c, uint16_t id, reader *r) {
  char queue[256];
  r_short(r);
  r_string(r, queue);
  unsigned bits = r_octet(r);
  if (queue[0] == 0) {
    snprintf(queue, sizeof queue, "amq.gen-%u", ++names_made);
  }
  if (!(bits & 16)) {
    reply(c, id, METHOD(50, 11), "Sll", queue, (uint32_t)0, (uint32_t)0);
  }
}

/* Skips a short and `strings` short strings; returns the flags that follow. */
static unsigned flags_after(reader *r, int strings) {
  char skipped[256];
  r_short(r);
  for (int i = 0; i < strings; i++) {
    r_string(r, skipped);
  }
  return r_octet(r);
}

static void channel_method(connection *c, uint16_t id, uint32_t method, reader *r) {
  channel *ch = find(c, id);
  if (method == METHOD(20, 10)) {
    if (channel_open(c, id)) {
      reply(c, id, METHOD(20, 11), "T");
    } else {
      connection_error(c, 504, "CHANNEL_ERROR - cannot open this channel");
    }
    return;
  }
  if (ch == NULL) {
    connection_error(c, 504, "CHANNEL_ERROR - no such channel");
    return;
  }
  if (ch->closing && method != METHOD(20, 41) && method != METHOD(20, 40)) {
    return;
  }
  if (ch->content != 0) {
    connection_error(c, 505, "UNEXPECTED_FRAME - content expected");
    return;
  }
  char text[256];
  switch (method) {
    case METHOD(60, 40): ch->content = 1; return;
    case METHOD(60, 80): {
      uint64_t tag = r_longlong(r);
      settle(ch, tag, r_octet(r) & 1, method);
      return;
    }
    case METHOD(60, 120): {
      uint64_t tag = r_longlong(r);
      settle(ch, tag, r_octet(r) & 1, method);
      return;
    }
    case METHOD(60, 90): settle(ch, r_longlong(r), false, method); return;
    case METHOD(20, 40):
      reply(c, id, METHOD(20, 41), "");
      channel_free(ch);
      return;
    case METHOD(20, 41): channel_free(ch); return;
    case METHOD(20, 20):
      ch->flow = r_octet(r) & 1;
      reply(c, id, METHOD(20, 21), "b", ch->flow ? 1 : 0);
      make_ready(ch);
      return;
    case METHOD(60, 10): {
      r_long(r);
      uint32_t count = r_short(r);
      if (r_octet(r) & 1) {
        ch->prefetch = count;
      } else {
        ch->next_prefetch = count;
      }
      reply(c, id, METHOD(60, 11), "");
      make_ready(ch);
      return;
    }
    case METHOD(60, 20): on_consume(ch, r); return;
    case METHOD(60, 30): {
      r_string(r, text);
      bool no_wait = r_octet(r) & 1;
      cancel(ch, text);
      if (!no_wait) {
        reply(c, id, METHOD(60, 31), "S", text);
      }
      return;
    }
    case METHOD(60, 70): reply(c, id, METHOD(60, 72), "S", ""); return;
    case METHOD(60, 110):
      if (ch->next_tag > ch->base) {
        settle(ch, 0, true, method);
      }
      reply(c, id, METHOD(60, 111), "");
      return;
    case METHOD(85, 10): {
      bool no_wait = r_octet(r) & 1;
      ch->confirm = true;
      if (!no_wait) {
        reply(c, id, METHOD(85, 11), "");
      }
      return;
    }
    case METHOD(50, 10): on_declare(c, id, r); return;
    case METHOD(50, 20):
      if (!(flags_after(r, 3) & 1)) {
        reply(c, id, METHOD(50, 21), "");
      }
      return;
    case METHOD(50, 50): reply(c, id, METHOD(50, 51), ""); return;
    case METHOD(50, 30):
      if (!(flags_after(r, 1) & 1)) {
        reply(c, id, METHOD(50, 31), "l", (uint32_t)0);
      }
      return;
    case METHOD(50, 40):
      if (!(flags_after(r, 1) & 4)) {
        reply(c, id, METHOD(50, 41), "l", (uint32_t)0);
      }
      return;
    case METHOD(40, 10):
      if (!(flags_after(r, 2) & 16)) {
        reply(c, id, METHOD(40, 11), "");
      }
      return;
    case METHOD(40, 20):
      if (!(flags_after(r, 1) & 2)) {
        reply(c, id, METHOD(40, 21), "");
      }
      return;
    case METHOD(40, 30):
      if (!(flags_after(r, 3) & 1)) {
        reply(c, id, METHOD(40, 31), "");
      }
      return;
    case METHOD(40, 40):
      if (!(flags_after(r, 3) & 1)) {
        reply(c, id, METHOD(40, 51), "");
      }
      return;
    default: connection_error(c, 540, "NOT_IMPLEMENTED - the null broker lacks it");
  }
}

static void connection_method(connection *c, uint32_t method, reader *r) {
  switch (method) {
    case METHOD(10, 11): /* start-ok: whoever it is */
      reply(c, 0, METHOD(10, 30), "sls", (int)opt.channel_max, opt.frame_max, (int)opt.heartbeat);
      c->state = S_TUNE_OK;
      return;
    case METHOD(10, 31): { /* tune-ok */
      r_short(r);
      uint32_t frame_max = r_long(r);
      c->heartbeat = r_short(r);
      if (frame_max != 0 && frame_max < FRAME_MIN) {
        connection_error(c, 501, "FRAME_ERROR - frame_max too small");
        return;
      }
      if (frame_max != 0 && frame_max < c->frame_max) {
        c->frame_max = frame_max;
      }
      c->state = S_OPEN;
      return;
    }
    case METHOD(10, 40):
      reply(c, 0, METHOD(10, 41), "S", "");
      c->state = S_RUNNING;
      return;
    case METHOD(10, 50):
      reply(c, 0, METHOD(10, 51), "");
      flush();
      c->dead = true;
      return;
    case METHOD(10, 51): c->dead = true; return;
    case METHOD(10, 70): reply(c, 0, METHOD(10, 71), ""); return;
    default: connection_error(c, 503, "COMMAND_INVALID");
  }
}

static void content_frame(connection *c, uint16_t id, int type, const uint8_t *payload,
                          uint32_t size) {
  channel *ch = find(c, id);
  if (ch == NULL) {
    connection_error(c, 504, "CHANNEL_ERROR - no such channel");
  } else if (ch->closing) {
    return;
  } else if (type == FRAME_HEADER && ch->content == 1 && size >= 14) {
    ch->content_left = get64(payload + 4);
    ch->content = 2;
    if (ch->content_left == 0) {
      published(ch);
    }
  } else if (type == FRAME_BODY && ch->content == 2 && size <= ch->content_left) {
    ch->content_left -= size;
    if (ch->content_left == 0) {
      published(ch);
    }
  } else {
    connection_error(c, 505, "UNEXPECTED_FRAME");
  }
}

static void frame(connection *c, const uint8_t *p, uint32_t size) {
  uint16_t id = get16(p + 1);
  int type = p[0];
  if (p[7 + size] != FRAME_END) {
    connection_error(c, 501, "FRAME_ERROR - no frame end");
  } else if (type == FRAME_METHOD && size >= 4) {
    reader r = {p + 11, p + 7 + size, false};
    uint32_t method = get32(p + 7);
    if (c->state == S_CLOSING && method != METHOD(10, 51) && method != METHOD(10, 50)) {
      return;
    }
    if (method >> 16 == 10) {
      connection_method(c, method, &r);
    } else if (c->state == S_RUNNING) {
      channel_method(c, id, method, &r);
    } else {
      connection_error(c, 503, "COMMAND_INVALID - not open");
    }
    if (r.bad) {
      connection_error(c, 502, "SYNTAX_ERROR - short method");
    }
  } else if (c->state == S_CLOSING || type == FRAME_HEARTBEAT) {
    return;
  } else if (type == FRAME_HEADER || type == FRAME_BODY) {
    content_frame(c, id, type, p + 7, size);
  } else {
    connection_error(c, 501, "FRAME_ERROR - unknown frame");
  }
}

/* Returns how many of the n bytes were used. */
static size_t scan(connection *c, const uint8_t *p, size_t n) {
  size_t used = 0;
  if (c->state == S_HEADER) {
    if (n < 8) {
      return 0;
    }
    static const uint8_t hello[8] = {'A', 'M', 'Q', 'P', 0, 0, 9, 1};
    if (memcmp(p, hello, 8) != 0) {
      emit(c, hello, 8);
      flush();
      c->dead = true;
      return n;
    }
    c->state = S_START_OK;
    send_start(c);
    used = 8;
  }
  while (!c->dead && n - used >= FRAME_OVERHEAD) {
    uint32_t size = get32(p + used + 3);
    if (size > c->frame_max - FRAME_OVERHEAD) {
      connection_error(c, 501, "FRAME_ERROR - frame too large");
      return n;
    }
    if (n - used < size + FRAME_OVERHEAD) {
      break;
    }
    frame(c, p + used, size);
    used += size + FRAME_OVERHEAD;
  }
  return used;
}

static void on_readable(connection *c) {
  size_t had = c->in_used;
  if (had > 0) {
    memcpy(in_area, c->in, had);
  }
  ssize_t got = recv(c->fd, in_area + had, opt.read_size, 0);
  if (got <= 0) {
    if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
      c->dead = true;
    }
    return;
  }
  c->last_in = now;
  size_t n = had + (size_t)got;
  size_t used = scan(c, in_area, n);
  size_t left = n - used;
  if (left > c->in_size) {
    c->in_size = left * 2;
    free(c->in);
    c->in = must(malloc(c->in_size));
  }
  if (left > 0) {
    memcpy(c->in, in_area + used, left);
  } else if (c->in_size > 0 && confirms_used == 0) {
    free(c->in); /* an idle connection keeps no buffer */
    c->in = NULL;
    c->in_size = 0;
  }
  c->in_used = left;
  send_confirms();
}

/* ---- connections -------------------------------------------------------- */

static void connection_free(connection *c) {
  close(c->fd);
  for (uint32_t i = 0; i < c->channels_size; i++) {
    if (c->channels[i] != NULL) {
      channel_free(c->channels[i]);
    }
  }
  if (c->next != NULL) {
    c->next->prev = c->prev;
  }
  if (c->prev != NULL) {
    c->prev->next = c->next;
  } else {
    connections = c->next;
  }
  if (out_owner == c) {
    out_owner = NULL;
    out_used = 0;
  }
  free(c->channels);
  free(c->in);
  free(c->out);
  free(c);
}

static void accept_all(int listener) {
  for (;;) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      return;
    }
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (opt.send_buffer > 0) {
      setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &opt.send_buffer, sizeof opt.send_buffer);
    }
    connection *c = must(calloc(1, sizeof *c));
    c->fd = fd;
    c->frame_max = opt.frame_max;
    c->last_in = c->last_out = now;
    c->next = connections;
    if (connections != NULL) {
      connections->prev = c;
    }
    connections = c;
    c->events = EPOLLIN;
    struct epoll_event e = {.events = c->events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0) {
      fatal("null_broker: epoll_ctl");
    }
  }
}

static void serve(connection *c, uint32_t events) {
  if (c->out_used > 0 && (events & EPOLLOUT)) {
    flush_kept(c);
  }
  if (c->out_used == 0 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) {
    on_readable(c);
  } else if (events & (EPOLLHUP | EPOLLERR)) {
    c->dead = true;
  }
  if (c->state == S_RUNNING && !c->dead) {
    pump(c);
  }
  flush();
  if (c->dead) {
    connection_free(c);
  } else {
    arm(c);
  }
}

static void tick(void) {
  static time_t last;
  if (now == last) {
    return;
  }
  last = now;
  for (connection *c = connections, *next; c != NULL; c = next) {
    next = c->next;
    if (c->heartbeat == 0 || c->state < S_RUNNING) {
      continue;
    }
    if (now - c->last_in > 2 * (time_t)c->heartbeat + 1 && c->out_used == 0) {
      fprintf(stderr, "null_broker: missed heartbeats from a client\n");
      connection_free(c);
      continue;
    }
    if (now - c->last_out >= (c->heartbeat + 1) / 2 && c->out_used == 0) {
      static const uint8_t beat[8] = {FRAME_HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END};
      emit(c, beat, sizeof beat);
      flush();
      arm(c);
    }
  }
}

static int listen_on(int port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    fatal("null_broker: socket");
  }
  int yes = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  struct sockaddr_in a = {.sin_family = AF_INET,
                          .sin_port = htons((uint16_t)port),
                          .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t n = sizeof a;
  if (bind(fd, (struct sockaddr *)&a, n) < 0 || listen(fd, 4096) < 0 ||
      getsockname(fd, (struct sockaddr *)&a, &n) < 0) {
    fatal("null_broker: cannot listen on 127.0.0.1");
  }
  printf("%d\n%ld\n", ntohs(a.sin_port), (long)getpid());
  fflush(stdout);
  return fd;
}

static void usage(FILE *to) {
  fputs("usage: null_broker [options]\n"
        "Listens on 127.0.0.1 and prints its port and its process id, a line each.\n"
        "  --port N         0, the default: any free one\n"
        "  --heartbeat N    seconds proposed (60; 0: none)\n"
        "  --channel-max N  (2047)\n"
        "  --frame-max N    (131072)\n"
        "  --read-size N    most bytes taken by one read, so confirmed by one ack (131072)\n"
        "  --send-buffer N  SO_SNDBUF of its sockets (the system's own)\n"
        "  --parent-death   end when the process that started it ends\n",
        to);
}

static void options(int argc, char **argv) {
  static const struct option known[] = {
      {"port", 1, NULL, 'p'},         {"heartbeat", 1, NULL, 'b'}, {"channel-max", 1, NULL, 'c'},
      {"frame-max", 1, NULL, 'f'},    {"read-size", 1, NULL, 'r'}, {"send-buffer", 1, NULL, 's'},
      {"parent-death", 0, NULL, 'd'}, {"help", 0, NULL, 'h'},      {NULL, 0, NULL, 0}};
  pid_t parent = getppid();
  for (int o; (o = getopt_long(argc, argv, "", known, NULL)) != -1;) {
    long v = optarg ? strtol(optarg, NULL, 10) : 0;
    switch (o) {
      case 'p': opt.port = (int)v; break;
      case 'b': opt.heartbeat = (uint32_t)v & 0xffff; break;
      case 'c': opt.channel_max = (uint32_t)v & 0xffff; break;
      case 'f': opt.frame_max = (uint32_t)v; break;
      case 'r': opt.read_size = (size_t)v; break;
      case 's': opt.send_buffer = (int)v; break;
      case 'd':
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (getppid() != parent) {
          exit(0);
        }
        break;
      case 'h': usage(stdout); exit(0);
      default: usage(stderr); exit(2);
    }
  }
  if (optind < argc || opt.frame_max < FRAME_MIN || opt.frame_max > OUT_SIZE ||
      opt.read_size < 64 || opt.port < 0 || opt.port > 65535) {
    usage(stderr);
    exit(2);
  }
}

int main(int argc, char **argv) {
  options(argc, argv);
  sigset_t stop;
  sigemptyset(&stop);
  sigaddset(&stop, SIGTERM);
  sigaddset(&stop, SIGINT);
  sigprocmask(SIG_BLOCK, &stop, NULL);
  int signal_fd = signalfd(-1, &stop, SFD_NONBLOCK | SFD_CLOEXEC);

  struct rlimit files;
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  in_area_size = opt.read_size + opt.frame_max + FRAME_OVERHEAD;
  in_area = must(malloc(in_area_size));
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  int listener = listen_on(opt.port);
  static char listener_mark, signal_mark;
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listener_mark};
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
  e.data.ptr = &signal_mark;
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, signal_fd, &e);

  for (;;) {
    static struct epoll_event events[256];
    int n = epoll_wait(epoll_fd, events, 256, 1000);
    now = monotonic();
    for (int i = 0; i < n; i++) {
      void *what = events[i].data.ptr;
      if (what == &signal_mark) {
        return 0;
      } else if (what == &listener_mark) {
        accept_all(listener);
      } else {
        serve(what, events[i].events);
      }
    }
    tick();
  }
}
