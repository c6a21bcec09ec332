/* Delays in the broker without a client of ours, to see what is the broker's own part of being late:
 *   ladder URL QUEUE SECONDS < messages
 * Each line of `messages` is "EXCHANGE KEY MILLISECONDS": where a message is published that must come to QUEUE so much
 * later. At most 16 are unconfirmed. Another process takes them, without acks. When all are home, or after SECONDS without
 * one, it prints a line for each that came: when (CLOCK_MONOTONIC), and how much later than its delay after its confirm. */
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_tcp_socket.h>
#endif
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "peer.h"

#define MOST 100000
#define WINDOW 16

/* Both processes see these. */
typedef struct {
  double confirmed[MOST], arrived[MOST];
} times;

typedef struct {
  char exchange[128], key[128];
  double delay;
} message;

static message messages[MOST];
static size_t count;
static times *at;
static amqp_connection_state_t conn;

static void check(bool ok, const char *what) {
  if (!ok) peer_die(what);
}

static void rpc(const char *what) {
  check(amqp_get_rpc_reply(conn).reply_type == AMQP_RESPONSE_NORMAL, what);
}

static void open_connection(const char *text) {
  struct amqp_connection_info info;
  char *url = strdup(text); /* it is cut into pieces, and each process needs it whole */
  check(amqp_parse_url(url, &info) == AMQP_STATUS_OK, "url");
  conn = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(conn);
  check(amqp_socket_open(socket, info.host, info.port) == AMQP_STATUS_OK, "connect");
  amqp_rpc_reply_t r = amqp_login(conn, info.vhost[0] ? info.vhost : "/", 0, 131072, 0,
                                  AMQP_SASL_METHOD_PLAIN, info.user, info.password);
  check(r.reply_type == AMQP_RESPONSE_NORMAL, "login");
  amqp_channel_open(conn, 1);
  rpc("channel");
}

static void read_messages(void) {
  long milliseconds;
  message *m = messages;
  while (count < MOST && scanf("%127s %127s %ld", m->exchange, m->key, &milliseconds) == 3) {
    m->delay = (double)milliseconds / 1e3;
    m = &messages[++count];
  }
}

static void take(const char *url, const char *queue, long seconds, int ready) {
  open_connection(url);
  amqp_basic_consume(conn, 1, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, 1, 0,
                     amqp_empty_table);
  rpc("consume");
  check(write(ready, "", 1) == 1, "pipe");
  for (size_t i = 0; i < count; i++) {
    amqp_envelope_t envelope;
    struct timeval patience = {.tv_sec = seconds};
    amqp_maybe_release_buffers(conn);
    if (amqp_consume_message(conn, &envelope, &patience, 0).reply_type != AMQP_RESPONSE_NORMAL)
      return;
    uint32_t number;
    check(envelope.message.body.len == sizeof number, "a body of another size");
    memcpy(&number, envelope.message.body.bytes, sizeof number);
    at->arrived[number] = peer_now();
    amqp_destroy_envelope(&envelope);
  }
}

static size_t first_unconfirmed;

static void confirm(uint64_t tag, bool all_before) {
  double now = peer_now();
  for (size_t i = all_before ? first_unconfirmed : tag - 1; i < tag; i++) {
    if (at->confirmed[i] == 0) at->confirmed[i] = now;
  }
  while (first_unconfirmed < count && at->confirmed[first_unconfirmed] != 0) first_unconfirmed++;
}

static void wait_confirm(void) {
  amqp_frame_t frame;
  check(amqp_simple_wait_frame(conn, &frame) == AMQP_STATUS_OK, "wait");
  check(frame.frame_type == AMQP_FRAME_METHOD && frame.payload.method.id == AMQP_BASIC_ACK_METHOD,
        "something else than a confirm");
  amqp_basic_ack_t *ack = frame.payload.method.decoded;
  confirm(ack->delivery_tag, ack->multiple);
  amqp_maybe_release_buffers(conn);
}

static void publish(uint32_t number) {
  const message *m = &messages[number];
  amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG,
                                        .delivery_mode = 2};
  amqp_bytes_t body = {.len = sizeof number, .bytes = &number};
  check(amqp_basic_publish(conn, 1,
                           strcmp(m->exchange, "-") == 0 ? amqp_empty_bytes
                                                         : amqp_cstring_bytes(m->exchange),
                           amqp_cstring_bytes(m->key), 0, 0, &properties, body) == AMQP_STATUS_OK,
        "publish");
}

int main(int argc, char **argv) {
  int ready[2];
  char byte;
  if (argc != 4) peer_die("usage: ladder URL QUEUE SECONDS");
  read_messages();
  at = mmap(NULL, sizeof *at, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  check(at != MAP_FAILED && pipe(ready) == 0, "memory");
  pid_t taker = fork();
  if (taker == 0) {
    take(argv[1], argv[2], atol(argv[3]), ready[1]);
    _exit(0);
  }
  close(ready[1]);
  check(read(ready[0], &byte, 1) == 1, "the consumer did not start");
  open_connection(argv[1]);
  amqp_confirm_select(conn, 1);
  rpc("confirm");
  for (uint32_t i = 0; i < count; i++) {
    while (i - first_unconfirmed >= WINDOW) wait_confirm();
    publish(i);
  }
  while (first_unconfirmed < count) wait_confirm();
  waitpid(taker, NULL, 0);
  for (size_t i = 0; i < count; i++) {
    double over = at->arrived[i] - at->confirmed[i] - messages[i].delay;
    if (at->arrived[i] != 0) printf("%.6f %.6f\n", at->arrived[i], over);
  }
  return 0;
}
