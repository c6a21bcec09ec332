/*
 * moonrabbit core: one AMQP 0-9-1 client connection as a state machine.
 *
 * Theory of operation
 *   bytes in   -> mr_engine_rx_reserve/commit (or mr_engine_feed)
 *   events out -> mr_engine_next, until it returns MR_EV_NONE
 *   commands   -> mr_channel_open, mr_call, mr_publish, mr_settle ...
 *   bytes out  -> mr_engine_tx_peek/consume
 *   time       -> every function that needs it takes `now`: monotonic seconds; mr_engine_deadline
 *                 tells when mr_engine_tick wants to be called next; an early tick is a no-op.
 * The core opens no socket, reads no clock, holds no Lua value and never calls back. Frames are
 * parsed when events are asked for, in place: the receive buffer *is* the queue of events, so a
 * caller that stops asking stops reading, and memory stays bounded.
 *
 * Ownership: what an event points to belongs to the engine and is valid until the next call of
 * mr_engine_next, mr_engine_rx_reserve, mr_engine_feed, mr_engine_tick or mr_engine_free. What a caller passes in
 * is copied before the call returns.
 *
 * The engine is not thread-safe: one engine belongs to one thread at a time.
 */
#ifndef MOONRABBIT_H
#define MOONRABBIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__has_include)
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/framing.h>
#define MR_HAVE_AMQP_H 1
#endif
#endif
#ifndef MR_HAVE_AMQP_H
#include <amqp.h>
#include <amqp_framing.h>
#endif

typedef struct mr_engine mr_engine;
typedef struct mr_channel mr_channel;
typedef struct mr_route mr_route;

/* What a command answers. Negative values sent nothing and changed nothing. */
typedef enum {
  MR_OK = 0,
  MR_FLUSH = 1,        /* done, and the bytes should leave soon: call tx_peek before going on */
  MR_NO_MEMORY = -1,   /* an allocation failed */
  MR_CLOSED = -2,      /* the channel or the connection is not open (any more) */
  MR_BLOCKED = -3,     /* the broker sent connection.blocked or channel.flow off */
  MR_WINDOW_FULL = -4, /* as many publishes are unconfirmed as the window allows */
  MR_OVERFLOW = -5,    /* the output buffer is over max_buffer */
  MR_TOO_LARGE = -6, /* a body over max_message_size, or a header frame or method over frame_max */
  MR_BAD_ARGUMENT = -7, /* a short string over 255 bytes, a table nested too deep, ... */
  MR_NO_CHANNELS = -8,  /* channel_max channels are open */
  MR_SETTLED = -9,      /* that delivery was settled before */
  MR_UNKNOWN_TAG = -10  /* no such delivery is outstanding on this channel */
} mr_status;

/* One English sentence for a status; static storage. */
const char *mr_status_text(mr_status status);

typedef enum {
  MR_KIND_CLOSED = 1, /* closed by the peer or by us, or the transport ended */
  MR_KIND_PROTOCOL,   /* the peer broke the protocol, or says that we did */
  MR_KIND_AUTH,       /* credentials or mechanism refused */
  MR_KIND_VHOST,      /* vhost unknown or not permitted */
  MR_KIND_TIMEOUT,    /* no heartbeat in time */
  MR_KIND_CHANNEL,    /* a channel-level exception */
  MR_KIND_BLOCKED,    /* reserved for the layers above */
  MR_KIND_MEMORY      /* an allocation failed */
} mr_kind;

/* Why a connection or a channel ended. */
typedef struct {
  mr_kind kind;
  uint16_t code;     /* AMQP reply code, 0 where there is none */
  uint16_t class_id; /* the method that the peer complains about, 0 where there is none */
  uint16_t method_id;
  char text[320]; /* NUL-terminated, printable */
} mr_error;

typedef struct {
  amqp_bytes_t vhost;
  amqp_bytes_t user;
  amqp_bytes_t password; /* copied, and wiped once it has been sent */
  const char *mechanism; /* "PLAIN", "AMQPLAIN" or "EXTERNAL"; NULL: PLAIN */
  uint16_t
      heartbeat; /* seconds; 0: none. The smaller of ours and the broker's nonzero wishes holds */
  uint32_t
      frame_max; /* bytes; 0: 131072; at least 4096; the smaller of ours and the broker's holds */
  uint16_t channel_max;           /* 0: what the broker says */
  uint64_t max_message_size;      /* bytes of a body, both ways; 0: 128 MiB */
  size_t max_buffer;              /* bytes of output that may wait; 0: 1 MiB */
  double ack_delay;               /* seconds that a gathered ack may wait; negative: 0.001 */
  amqp_table_t client_properties; /* merged over the engine's own (product, capabilities, ...) */
} mr_config;

/* NULL: out of memory, or a config that cannot be (err->text says what). Free with mr_engine_free. */
mr_engine *mr_engine_new(const mr_config *config, mr_error *err);
/* NULL is allowed. Channels of this engine that were not released yet stay readable (closed). */
void mr_engine_free(mr_engine *engine);

/* Queues the protocol header. Call once, when the transport is connected. */
mr_status mr_engine_start(mr_engine *engine, double now);

/* ---- bytes in ---- */
/* A place to write received bytes to; *space is set to its size. NULL: no room until events are
 * taken (back-pressure), or out of memory. Valid until the next call on this engine. */
uint8_t *mr_engine_rx_reserve(mr_engine *engine, size_t *space);
/* `n` bytes were written to the place of rx_reserve. */
void mr_engine_rx_commit(mr_engine *engine, size_t n, double now);
/* Copies in as much of the bytes as there is room for; returns how many. */
size_t mr_engine_feed(mr_engine *engine, const void *bytes, size_t n, double now);
/* The transport ended; `text` (may be NULL) says how. An MR_EV_CLOSED follows the events that were
 * received whole. */
void mr_engine_eof(mr_engine *engine, const char *text);

/* ---- bytes out ---- */
/* What is to be written now; NULL and *len = 0 when there is nothing. Gathered acks are put in
 * front of the peek whenever anything else is to leave. Valid until the next call on this engine. */
const uint8_t *mr_engine_tx_peek(mr_engine *engine, size_t *len);
/* `n` of the peeked bytes were written. */
void mr_engine_tx_consume(mr_engine *engine, size_t n, double now);
/* Bytes waiting, not counting gathered acks. */
size_t mr_engine_tx_pending(const mr_engine *engine);

/* ---- time ---- */
/* When mr_engine_tick wants to be called, in seconds of the clock of `now`; a negative value:
 * never. Call it before sleeping: it starts the ack_delay of acks gathered since. */
double mr_engine_deadline(mr_engine *engine, double now);
/* When a peer that goes on saying nothing is taken for gone (a part of the deadline); a negative value:
 * never. */
double mr_engine_silence_deadline(const mr_engine *engine);
/* Sends due heartbeats and gathered acks, notices a silent peer. */
void mr_engine_tick(mr_engine *engine, double now);
/* While reading is paused on purpose, silence is not the peer's fault. */
void mr_engine_pause(mr_engine *engine, bool paused, double now);

/* ---- events ---- */
typedef enum {
  MR_EV_NONE = 0,
  MR_EV_OPEN,    /* the handshake is done; see mr_engine_server_properties, mr_engine_tuned */
  MR_EV_REPLY,   /* `method` answers the oldest such call of `channel` (NULL: of the connection) */
  MR_EV_DELIVER, /* content */
  MR_EV_GET_OK,  /* content; answers the oldest call, a basic.get */
  MR_EV_RETURN,  /* content with reply_code, reply_text and, if it was ours, seq */
  MR_EV_CONFIRM, /* confirm.first..last settled on `channel` as acked, or as confirm.outcome */
  MR_EV_CONSUMER_CANCEL, /* the broker cancelled consumer_tag (already answered) */
  MR_EV_FLOW,            /* the broker's channel.flow: `active` (already answered) */
  MR_EV_CHANNEL_CLOSED,  /* the broker closed `channel`: `error` (already answered); what it still
                            sends of it, another close too, is passed over */
  MR_EV_BLOCKED,         /* `text` is the reason */
  MR_EV_UNBLOCKED,
  MR_EV_CLOSED /* the end: `error`. Nothing follows but MR_EV_NONE; what tx_peek still
                           holds (a close, a close-ok) should be written if it can be */
} mr_event_type;

typedef enum {
  MR_PENDING = 0,  /* sent (or still in the buffer), unsettled */
  MR_RETURNED = 1, /* came back; its ack is still to come */
  MR_ACKED = 2,
  MR_NACKED = 3,
  MR_UNROUTABLE = 4, /* returned, then acked */
  MR_LOST = 5        /* unsettled when its channel or connection ended */
} mr_outcome;

typedef struct {
  uint64_t delivery_tag;
  bool redelivered;
  bool no_ack;            /* the consumer (or get) asked for no acks: there is nothing to settle */
  uint32_t message_count; /* of get-ok */
  uint32_t consumer_ref;  /* what mr_consume was given; 0 for get-ok and returns */
  amqp_bytes_t consumer_tag;
  amqp_bytes_t exchange;
  amqp_bytes_t routing_key;
  amqp_bytes_t props; /* raw: property flags and property list, checked well-formed */
  amqp_bytes_t body;
  uint16_t reply_code; /* of a return */
  amqp_bytes_t reply_text;
  uint64_t seq; /* of a return that was correlated, else 0 */
} mr_content;

typedef struct {
  mr_event_type type;
  mr_channel *channel;  /* NULL for events of the connection */
  amqp_method_t method; /* MR_EV_REPLY: id and the decoded amqp_*_t of rabbitmq-c */
  mr_content content;   /* DELIVER, GET_OK, RETURN */
  struct {
    uint64_t first, last;
    mr_outcome outcome; /* MR_ACKED for a whole range, else first == last */
  } confirm;
  amqp_bytes_t consumer_tag; /* CONSUMER_CANCEL */
  uint32_t consumer_ref;     /* CONSUMER_CANCEL */
  bool active;               /* FLOW */
  amqp_bytes_t text;         /* BLOCKED */
  mr_error error;            /* CHANNEL_CLOSED, CLOSED */
} mr_event;

/* Takes the next event. Returns its type. */
mr_event_type mr_engine_next(mr_engine *engine, mr_event *event);

/* ---- the connection ---- */
bool mr_engine_is_open(const mr_engine *engine);
bool mr_engine_is_blocked(const mr_engine *engine);
/* The client's own will: while publishing is held, publishes answer MR_BLOCKED. */
void mr_engine_hold(mr_engine *engine, bool held);
/* Starts a graceful close: gathered acks, then Connection.Close. MR_EV_CLOSED follows on close-ok. */
mr_status mr_engine_close(mr_engine *engine, uint16_t code, const char *text);
/* RabbitMQ's connection.update-secret (3.8+). Answered by MR_EV_REPLY with
 * MR_CONNECTION_UPDATE_SECRET_OK and decoded = NULL. */
#define MR_CONNECTION_UPDATE_SECRET ((amqp_method_number_t)0x000A0046)
#define MR_CONNECTION_UPDATE_SECRET_OK ((amqp_method_number_t)0x000A0047)
mr_status mr_engine_update_secret(mr_engine *engine, amqp_bytes_t secret, amqp_bytes_t reason);
/* Valid from MR_EV_OPEN until mr_engine_free. */
const amqp_table_t *mr_engine_server_properties(const mr_engine *engine);
typedef struct {
  uint16_t channel_max;
  uint32_t frame_max;
  uint16_t heartbeat;
} mr_tuned;
mr_tuned mr_engine_tuned(const mr_engine *engine);

/* ---- channels ---- */
/* Queues channel.open; an MR_EV_REPLY with AMQP_CHANNEL_OPEN_OK_METHOD follows. The handle belongs
 * to the caller: release it with mr_channel_release, before or after the engine is freed. */
mr_status mr_channel_open(mr_engine *engine, mr_channel **channel);
/* Flushes gathered acks and queues channel.close; MR_EV_REPLY with AMQP_CHANNEL_CLOSE_OK_METHOD
 * follows. */
mr_status mr_channel_close(mr_channel *channel, uint16_t code, const char *text);
/* Gives the handle back; a channel that is still open is closed. NULL is allowed. */
void mr_channel_release(mr_channel *channel);
uint16_t mr_channel_id(const mr_channel *channel);
bool mr_channel_is_open(const mr_channel *channel);
/* A pointer of the caller's, NULL at first. */
void mr_channel_set_user(mr_channel *channel, void *user);
void *mr_channel_user(const mr_channel *channel);
/* The largest number of deliveries that may wait for a gathered ack is a quarter of this, the
 * channel's smallest prefetch; mr_call keeps it from basic.qos by itself. */
uint16_t mr_channel_prefetch(const mr_channel *channel);

/* Sends any method of a client that has no content. `decoded` is the amqp_*_t struct of rabbitmq-c
 * for `method`. Methods that the broker answers queue an expected reply; calls of one channel are
 * answered in order, so they can be pipelined. nowait fields are obeyed (nothing is expected then).
 * cancel, recover, tx and close flush gathered acks first. */
mr_status mr_call(mr_channel *channel, amqp_method_number_t method, void *decoded);
/* basic.consume; `ref` (not 0) comes back in every delivery of this consumer. The tag must be set. */
mr_status mr_consume(mr_channel *channel, const amqp_basic_consume_t *consume, uint32_t ref);
/* basic.get */
mr_status mr_get(mr_channel *channel, amqp_bytes_t queue, bool no_ack);

/* ---- publishing ---- */
#define MR_SEQ_HEADER "moonrabbit-seq"
typedef struct {
  amqp_bytes_t exchange;
  amqp_bytes_t routing_key;
  bool mandatory;
  amqp_bytes_t props; /* encoded by mr_props_encode or raw from a message; len 0: none */
  amqp_bytes_t body;
} mr_publish_args;
/* basic.publish. On a confirm channel *seq (may be NULL) is its number, else 0. A mandatory publish
 * on a confirm channel carries MR_SEQ_HEADER. MR_OK or MR_FLUSH when taken. */
mr_status mr_publish(mr_channel *channel, const mr_publish_args *args, uint64_t *seq);

/* A prepared route: everything but the body, encoded once. Independent of any engine. */
mr_status mr_route_new(const mr_publish_args *args, mr_route **route);
void mr_route_free(mr_route *route);
/* Writes a number, as 12 hexadecimal digits, over the end of the route's message id.
 * MR_BAD_ARGUMENT where that is shorter. */
mr_status mr_route_stamp(mr_route *route, uint64_t number);
mr_status mr_publish_route(mr_channel *channel, const mr_route *route, amqp_bytes_t body,
                           uint64_t *seq);

/* The most publishes that may be unconfirmed; 0: no bound but memory. Default 65536. */
void mr_channel_set_window(mr_channel *channel, uint32_t window);
bool mr_channel_is_confirm(const mr_channel *channel);
/* How a publish of this channel ended or stands. Exact for the ones that are not settled yet; a
 * settled one counts as MR_ACKED, so note failures when MR_EV_CONFIRM reports them. Works after
 * the channel has closed: what was unsettled then is MR_LOST. */
mr_outcome mr_confirm_outcome(const mr_channel *channel, uint64_t seq);
/* Publishes not settled yet (0 after close), the oldest of them, and the next number. */
uint64_t mr_confirm_unsettled(const mr_channel *channel);
uint64_t mr_confirm_oldest(const mr_channel *channel);
uint64_t mr_confirm_next(const mr_channel *channel);
/* Publishes that were unsettled when the channel or connection ended; 0 before. */
uint64_t mr_confirm_lost(const mr_channel *channel);
/* Slots of the ring, a power of two: seq & (capacity - 1) is unique among those held, which are the
 * publishes from the oldest unsettled one to the newest. */
uint64_t mr_confirm_capacity(const mr_channel *channel);
uint64_t mr_confirm_held(const mr_channel *channel);
/* Makes the slot of the next publish now, for whoever keeps a ring of the same size. MR_WINDOW_FULL,
 * MR_NO_MEMORY. */
mr_status mr_confirm_reserve(mr_channel *channel);

/* ---- settling ---- */
typedef enum { MR_SETTLE_ACK, MR_SETTLE_NACK, MR_SETTLE_REJECT } mr_settle_kind;
/* Settles one delivery. Acks are gathered; nacks and rejects are written at once. MR_FLUSH: a
 * quarter of the prefetch is gathered, write now. MR_SETTLED, MR_UNKNOWN_TAG, MR_CLOSED otherwise;
 * MR_CLOSED too for what a basic.recover gave back. */
mr_status mr_settle(mr_channel *channel, uint64_t tag, mr_settle_kind kind, bool requeue);
/* Whether a delivery is still to be settled: MR_OK, or what mr_settle would answer. */
mr_status mr_outstanding(const mr_channel *channel, uint64_t tag);
/* Settles every outstanding delivery up to and including `tag` (0: all, which may be none). Not for
 * rejects. */
mr_status mr_settle_upto(mr_channel *channel, uint64_t tag, mr_settle_kind kind, bool requeue);
/* Writes what is gathered to the output buffer. */
mr_status mr_flush_acks(mr_channel *channel);
/* Deliveries that are not settled yet. */
size_t mr_unsettled(const mr_channel *channel);

/* ---- tables and properties ---- */
#define MR_MAX_NESTING 32
/* Encodes properties (flags and list). *out is malloc'ed, the caller frees it. */
mr_status mr_props_encode(const amqp_basic_properties_t *props, uint8_t **out, size_t *len);
/* The same into the caller's space; returns the length, or a negative mr_status. */
long mr_props_encode_to(const amqp_basic_properties_t *props, uint8_t *out, size_t space);
/* Whether raw properties are well-formed, nested at most MR_MAX_NESTING deep. NULL: they are;
 * else what is wrong (static). */
const char *mr_props_check(amqp_bytes_t props);
/* The same for an encoded table with its 4-byte length. */
const char *mr_table_check(amqp_bytes_t table);
/* The message id of checked properties, in place; without bytes where there is none. */
amqp_bytes_t mr_props_message_id(amqp_bytes_t props);
/* Whether checked properties have a header of that name. */
bool mr_props_has_header(amqp_bytes_t props, amqp_bytes_t name);
/* Decodes checked raw properties into *props with memory of `pool`. */
mr_status mr_props_decode(amqp_bytes_t props, amqp_pool_t *pool, amqp_basic_properties_t **out);
/* Depth of a table to be encoded, bounded: MR_BAD_ARGUMENT when deeper than MR_MAX_NESTING. */
mr_status mr_table_depth_ok(const amqp_table_t *table);
/* A copy of checked raw properties without the headers named in `remove`, and with the entries of
 * `set` added (replacing those of the same name). All other bytes stay as they are, in their order;
 * the headers property disappears when it becomes empty and was given keys to remove.
 * *out is malloc'ed, the caller frees it. */
mr_status mr_props_edit(amqp_bytes_t props, const amqp_bytes_t *remove, size_t n_remove,
                        const amqp_table_t *set, uint8_t **out, size_t *len);

#endif
