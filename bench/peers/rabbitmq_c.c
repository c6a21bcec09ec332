/* rabbitmq-c in a tight loop: its fast path, as a C program would use it. */
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_tcp_socket.h>
#endif

#include "peer.h"

static amqp_connection_state_t conn;

static void check_rpc(amqp_rpc_reply_t r, const char *what) {
  if (r.reply_type != AMQP_RESPONSE_NORMAL) {
    peer_die(what);
  }
}

static void check(int status, const char *what) {
  if (status != AMQP_STATUS_OK) {
    fprintf(stderr, "peer: %s: %s\n", what, amqp_error_string2(status));
    exit(1);
  }
}

static void open_connection(char *url) {
  struct amqp_connection_info info;
  check(amqp_parse_url(url, &info), "url");
  if (info.vhost[0] == 0) {
    info.vhost = (char *)"/";
  }
  conn = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(conn);
  check(amqp_socket_open(socket, info.host, info.port), "connect");
  check_rpc(
      amqp_login(conn, info.vhost, 0, 131072, 60, AMQP_SASL_METHOD_PLAIN, info.user, info.password),
      "login");
  amqp_channel_open(conn, 1);
  check_rpc(amqp_get_rpc_reply(conn), "channel");
}

static void declare(const char *queue, bool passive) {
  amqp_queue_declare(conn, 1, amqp_cstring_bytes(queue), passive, 1, 0, 0, amqp_empty_table);
  check_rpc(amqp_get_rpc_reply(conn), "queue");
}

/* Publishes base <= tag < next are not confirmed, but for those marked. */
static uint64_t base = 1, next = 1;
static bool *marked;
static uint32_t window;

static void wait_confirm(void) {
  amqp_frame_t frame;
  check(amqp_simple_wait_frame(conn, &frame), "wait");
  if (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD) {
    peer_die("something else than a confirm");
  }
  amqp_basic_ack_t *ack = frame.payload.method.decoded;
  if (ack->multiple) {
    while (base <= ack->delivery_tag) {
      marked[base++ % window] = false;
    }
  } else {
    marked[ack->delivery_tag % window] = true;
  }
  while (base < next && marked[base % window]) {
    marked[base++ % window] = false;
  }
  amqp_maybe_release_buffers(conn);
}

static void publish_one(const peer_args *a, amqp_bytes_t body) {
  amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG,
                                        .delivery_mode = 2};
  check(amqp_basic_publish(conn, 1, amqp_empty_bytes, amqp_cstring_bytes(a->queue), 1, 0,
                           &properties, body),
        "publish");
  next++;
}

static void publish(const peer_args *a, double *trips) {
  amqp_confirm_select(conn, 1);
  check_rpc(amqp_get_rpc_reply(conn), "confirm.select");
  window = trips != NULL ? 1 : a->window;
  marked = calloc(window, sizeof *marked);
  amqp_bytes_t body = amqp_bytes_malloc(a->size);
  memset(body.bytes, 'x', a->size);
  peer_start();
  for (uint64_t i = 0; i < a->count; i++) {
    double started = trips != NULL ? peer_now() : 0;
    while (next - base >= window) {
      wait_confirm();
    }
    publish_one(a, body);
    if (trips != NULL) {
      while (base < next) {
        wait_confirm();
      }
      trips[i] = peer_now() - started;
    }
  }
  while (base < next) {
    wait_confirm();
  }
  peer_report(a->count, trips);
}

/* every: how many messages an ack settles. */
static void consume(const peer_args *a, uint64_t every) {
  amqp_basic_qos(conn, 1, 0, (uint16_t)a->window, 0);
  check_rpc(amqp_get_rpc_reply(conn), "qos");
  peer_start();
  amqp_basic_consume(conn, 1, amqp_cstring_bytes(a->queue), amqp_empty_bytes, 0, 0, 0,
                     amqp_empty_table);
  check_rpc(amqp_get_rpc_reply(conn), "consume");
  for (uint64_t i = 1; i <= a->count; i++) {
    amqp_envelope_t envelope;
    amqp_maybe_release_buffers(conn);
    check_rpc(amqp_consume_message(conn, &envelope, NULL, 0), "consume");
    if (envelope.message.body.len != a->size) {
      peer_die("a body of another size");
    }
    if (i % every == 0 || i == a->count) {
      check(amqp_basic_ack(conn, 1, envelope.delivery_tag, every > 1), "ack");
    }
    amqp_destroy_envelope(&envelope);
  }
  declare(a->queue, true); /* its answer says that the acks are there */
  peer_report(a->count, NULL);
}

int main(int argc, char **argv) {
  peer_args a = peer_parse(argc, argv);
  open_connection(a.url);
  declare(a.queue, false);
  if (strcmp(a.mode, "publish") == 0) {
    publish(&a, NULL);
  } else if (strcmp(a.mode, "roundtrip") == 0) {
    publish(&a, malloc(a.count * sizeof(double)));
  } else if (strcmp(a.mode, "consume") == 0) {
    consume(&a, 1);
  } else if (strcmp(a.mode, "consume100") == 0) {
    consume(&a, 100);
  } else {
    peer_die("unknown mode");
  }
  amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
  amqp_destroy_connection(conn);
  return 0;
}
