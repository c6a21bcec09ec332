/* Prepares the queues that the peers are measured on:
 *   queue <declare|purge|delete> URL QUEUE */
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_tcp_socket.h>
#endif
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static amqp_connection_state_t conn;

static void check(bool ok, const char *what) {
  if (!ok) {
    fprintf(stderr, "queue: %s failed\n", what);
    exit(1);
  }
}

static void rpc(const char *what) {
  check(amqp_get_rpc_reply(conn).reply_type == AMQP_RESPONSE_NORMAL, what);
}

static void open_connection(char *url) {
  struct amqp_connection_info info;
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

int main(int argc, char **argv) {
  check(argc == 4, "usage: queue declare|purge|delete URL QUEUE: it");
  open_connection(argv[2]);
  amqp_bytes_t queue = amqp_cstring_bytes(argv[3]);
  amqp_queue_declare(conn, 1, queue, 0, 1, 0, 0, amqp_empty_table);
  rpc("declare");
  if (strcmp(argv[1], "purge") == 0) {
    amqp_queue_purge(conn, 1, queue);
    rpc("purge");
  }
  if (strcmp(argv[1], "delete") == 0) {
    amqp_queue_delete(conn, 1, queue, 0, 0);
    rpc("delete");
  }
  amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
  amqp_destroy_connection(conn);
  return 0;
}
