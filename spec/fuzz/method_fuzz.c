/*
 * One method of the broker's with any arguments, in the state in which it is expected. The first
 * byte picks the method, the second the channel's state, the rest is its arguments.
 */
#include "../core/peer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const amqp_method_number_t METHODS[] = {
    AMQP_CONNECTION_START_METHOD,    AMQP_CONNECTION_SECURE_METHOD,
    AMQP_CONNECTION_TUNE_METHOD,     AMQP_CONNECTION_OPEN_OK_METHOD,
    AMQP_CONNECTION_CLOSE_METHOD,    AMQP_CONNECTION_CLOSE_OK_METHOD,
    AMQP_CONNECTION_BLOCKED_METHOD,  AMQP_CONNECTION_UNBLOCKED_METHOD,
    MR_CONNECTION_UPDATE_SECRET_OK,  AMQP_CHANNEL_OPEN_OK_METHOD,
    AMQP_CHANNEL_FLOW_METHOD,        AMQP_CHANNEL_FLOW_OK_METHOD,
    AMQP_CHANNEL_CLOSE_METHOD,       AMQP_CHANNEL_CLOSE_OK_METHOD,
    AMQP_EXCHANGE_DECLARE_OK_METHOD, AMQP_EXCHANGE_DELETE_OK_METHOD,
    AMQP_EXCHANGE_BIND_OK_METHOD,    AMQP_EXCHANGE_UNBIND_OK_METHOD,
    AMQP_QUEUE_DECLARE_OK_METHOD,    AMQP_QUEUE_BIND_OK_METHOD,
    AMQP_QUEUE_UNBIND_OK_METHOD,     AMQP_QUEUE_PURGE_OK_METHOD,
    AMQP_QUEUE_DELETE_OK_METHOD,     AMQP_BASIC_QOS_OK_METHOD,
    AMQP_BASIC_CONSUME_OK_METHOD,    AMQP_BASIC_CANCEL_METHOD,
    AMQP_BASIC_CANCEL_OK_METHOD,     AMQP_BASIC_RETURN_METHOD,
    AMQP_BASIC_DELIVER_METHOD,       AMQP_BASIC_GET_OK_METHOD,
    AMQP_BASIC_GET_EMPTY_METHOD,     AMQP_BASIC_ACK_METHOD,
    AMQP_BASIC_NACK_METHOD,          AMQP_BASIC_RECOVER_OK_METHOD,
    AMQP_TX_SELECT_OK_METHOD,        AMQP_TX_COMMIT_OK_METHOD,
    AMQP_TX_ROLLBACK_OK_METHOD,      AMQP_CONFIRM_SELECT_OK_METHOD};
enum { N_METHODS = sizeof METHODS / sizeof *METHODS };

/* The call that this method answers, if any. */
static void ask(peer *p, mr_channel *channel, amqp_method_number_t answer) {
  static uint8_t nothing[256];
  switch (answer) {
    case MR_CONNECTION_UPDATE_SECRET_OK:
      mr_engine_update_secret(p->engine, BYTES("s"), BYTES("r"));
      break;
    case AMQP_CHANNEL_CLOSE_OK_METHOD: mr_channel_close(channel, 200, ""); break;
    case AMQP_CONNECTION_CLOSE_OK_METHOD: mr_engine_close(p->engine, 200, ""); break;
    case AMQP_BASIC_GET_OK_METHOD:
    case AMQP_BASIC_GET_EMPTY_METHOD: mr_get(channel, BYTES("q"), false); break;
    case AMQP_BASIC_CONSUME_OK_METHOD:
      mr_consume(channel, &(amqp_basic_consume_t){.queue = BYTES("q"), .consumer_tag = BYTES("d")},
                 2);
      break;
    case AMQP_EXCHANGE_UNBIND_OK_METHOD:
      mr_call(channel, AMQP_EXCHANGE_UNBIND_METHOD, nothing);
      break;
    default: mr_call(channel, answer - 1, nothing); /* refused where it is no call */
  }
}

static void drain(peer *p) {
  while (peer_next(p) != MR_EV_NONE) {}
  peer_pull(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  amqp_method_number_t method;
  mr_config config = peer_config();
  mr_channel *channel = NULL;
  peer *p;
  bool early;
  if (size < 2 || size > 100000) return 0;
  method = METHODS[data[0] % N_METHODS];
  early = method == AMQP_CONNECTION_START_METHOD || method == AMQP_CONNECTION_SECURE_METHOD ||
          method == AMQP_CONNECTION_TUNE_METHOD || method == AMQP_CONNECTION_OPEN_OK_METHOD;
  if (early) {
    p = peer_new(&config);
    CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
    if (method != AMQP_CONNECTION_START_METHOD) peer_start(p, "PLAIN");
    if (method == AMQP_CONNECTION_OPEN_OK_METHOD) peer_tune(p, 0, 0, 0);
  } else {
    p = peer_open();
    channel = peer_confirm_channel(p);
    for (int i = 0; i < 3; i++) peer_publish(channel, true, "b", NULL);
    peer_discard(p);
    peer_consume(p, channel, "c", 1, false);
    ask(p, channel, method);
    if (data[1] & 1) ask(p, channel, method);
    if (data[1] & 2) peer_deliver(p, 1, "c", 1, "b");
    if (data[1] & 4) mr_channel_close(channel, 200, "");
    if (data[1] & 8) {
      mr_channel_release(channel);
      channel = NULL;
    }
  }
  drain(p);
  peer_room(&p->to_client, size + 12);
  {
    uint8_t *payload = malloc(size + 2);
    if (!payload) abort();
    peer_be(payload, method, 4);
    memcpy(payload + 4, data + 2, size - 2);
    peer_frame_of(p, AMQP_FRAME_METHOD, method >> 16 == AMQP_CONNECTION_CLASS ? 0 : 1, payload,
                  size + 2);
    free(payload);
  }
  drain(p);
  if (!p->closed && !early) { /* the content that may belong to it */
    peer_header(p, 1, 1, NULL);
    peer_body(p, 1, "b", 1);
    drain(p);
  }
  mr_engine_eof(p->engine, NULL);
  drain(p);
  mr_channel_release(channel);
  peer_free(p);
  return 0;
}
