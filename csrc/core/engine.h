/* Inside the engine: what its files share. Nothing outside csrc/core includes this. */
#ifndef MR_ENGINE_H
#define MR_ENGINE_H

#include "core/ack.h"
#include "core/buffer.h"
#include "core/confirm.h"
#include "core/method.h"
#include "core/moonrabbit.h"
#include "core/table.h"
#include "core/wire.h"

/*
 * The life of a connection. Each state names what the engine waits for.
 *
 *   IDLE --start--> WAIT_START --Start/StartOk--> WAIT_TUNE --Tune/TuneOk,Open--> WAIT_OPEN
 *   WAIT_OPEN --OpenOk--> OPEN --mr_engine_close/Close--> CLOSING --CloseOk--> ENDED
 *   any --Close/CloseOk, eof, silence, broken rule--> ENDED
 *
 * ENDED with `ended_reported` false still owes its MR_EV_CLOSED.
 */
typedef enum {
  MR_IDLE,
  MR_WAIT_START,
  MR_WAIT_TUNE,
  MR_WAIT_OPEN,
  MR_OPEN,
  MR_CLOSING,
  MR_ENDED
} mr_state;

/* A call that the broker still has to answer. */
typedef struct {
  amqp_method_number_t reply;
  bool no_ack; /* of basic.get */
  bool silent; /* nobody is told of the answer */
} mr_call_entry;

typedef struct {
  mr_call_entry *items; /* owned */
  size_t cap, head, tail;
} mr_calls;

typedef struct {
  char tag[MR_SHORTSTR_MAX + 1];
  uint8_t tag_len;
  bool no_ack;
  bool cancelling; /* basic.cancel was sent: its tag may be taken again already */
  uint32_t hash;
  uint32_t ref;
} mr_consumer;

/* A message that arrives in frames: method, header, body. */
typedef struct {
  amqp_method_number_t method; /* 0: none is arriving */
  bool have_header;
  bool discard;  /* the channel is closing: nobody wants it */
  uint64_t size; /* of the body */
  mr_content content;
  mr_buffer strings; /* the method's short strings, one after the other */
  mr_buffer props;
  mr_buffer body; /* only for bodies of more than one frame */
} mr_assembly;

/* Bytes of output: each time that so much more is there, it should leave; and what room for it an idle
 * connection may keep. */
enum { MR_TX_FLUSH = 262144, MR_TX_KEEP = 2 * MR_TX_FLUSH };

typedef enum { MR_CH_OPENING, MR_CH_OPEN, MR_CH_CLOSING, MR_CH_CLOSED } mr_channel_state;

struct mr_channel {
  mr_engine *engine; /* NULL once the connection has ended or the channel is closed */
  uint16_t id;
  mr_channel_state state;
  bool released; /* the user gave the handle back: freed with its last frame */
  bool ended_by_broker;
  bool confirm;
  bool flow_off;
  uint16_t prefetch;
  uint32_t recovering; /* recovers sent and not answered: deliveries meanwhile are taken back too */
  void *user;
  mr_calls calls;
  mr_confirms confirms;
  mr_acks acks;
  mr_channel *next_gathered; /* in mr_engine.gathered; a channel is in it while `is_gathered` */
  bool is_gathered;
  mr_consumer *consumers; /* owned */
  size_t n_consumers, cap_consumers, last_consumer;
  mr_assembly assembly;
};

enum { MR_BY_BROKER = 1, MR_BY_CLIENT = 2 };

struct mr_engine {
  mr_state state;
  bool ended_reported;
  bool eof;
  uint8_t blocked; /* who holds publishing: MR_BY_BROKER, MR_BY_CLIENT */
  bool paused;
  bool reprieved;          /* the present silence was excused once */
  bool close_reports_auth; /* the broker promised to say when it refuses credentials */
  mr_error error;          /* why it ended */
  char eof_text[128];

  /* configuration, copied; freed with the engine */
  amqp_bytes_t vhost, user, password;
  char mechanism[12];
  mr_buffer client_properties; /* an encoded table */
  mr_tuned tuned;              /* our wishes until the broker's Tune */
  uint64_t max_message_size;
  size_t max_buffer;
  double ack_delay;

  mr_buffer rx;
  size_t rx_need;   /* bytes that the frame at the head wants; the buffer makes room for them */
  size_t rx_target; /* how much it may hold; grows while reads fill it */
  size_t rx_space;  /* what the last rx_reserve offered */
  mr_buffer tx;
  size_t answers; /* bytes of answers queued since the output was empty */

  double last_rx;
  double last_tick;
  double next_heartbeat; /* when the next one is due if nothing else leaves */
  double ack_deadline;   /* negative: no gathered ack waits */

  mr_channel **channels; /* by number; owned array; 0 is never used */
  uint32_t *retired; /* by number; owned array: as the how-manieth the broker closed it; 0: no */
  uint32_t retirements;
  size_t cap_channels;
  uint16_t open_channels;
  uint32_t channel_hint; /* the lowest number that may be free */
  mr_channel *gathered;  /* channels with acks to write */
  mr_calls calls;        /* of the connection: update-secret */

  mr_confirm_cursor cursor; /* confirms still to report, of cursor_channel */
  mr_channel *cursor_channel;
  mr_channel *delivering; /* its assembly is what the last event shows; reset by the next */

  amqp_pool_t pool; /* for what the last event shows */
  bool pool_used;
  amqp_pool_t server_pool;
  amqp_table_t server_properties;
};

/* ---- end.c ---- */
/* Ends the connection; the first reason wins. */
void mr_end(mr_engine *e, mr_kind kind, uint16_t code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* The peer broke the protocol: a Connection.Close with `code` is queued, and the connection ends. */
void mr_protocol_error(mr_engine *e, uint16_t code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Copies text of the network into an error, printable and cut to fit. */
void mr_error_text(mr_error *error, amqp_bytes_t text);
/* Frees what an ended connection no longer needs; detaches its channels. */
void mr_detach_channels(mr_engine *e);

/* ---- send.c ---- */
/* Encodes a method frame with rabbitmq-c. */
mr_status mr_send_method(mr_engine *e, uint16_t channel, amqp_method_number_t method,
                         void *decoded);
/* Sends what a broker's method asks for. A broker that asks and asks without reading the answers ends
 * the connection before they fill the memory. False: the connection has ended. */
bool mr_answer(mr_engine *e, uint16_t channel, amqp_method_number_t method, void *decoded);
/* Decodes checked arguments with memory of `pool`; NULL: out of memory, and the connection ended. */
void *mr_decode_method(mr_engine *e, amqp_pool_t *pool, amqp_method_number_t method,
                       amqp_bytes_t args);

/* ---- handshake.c ---- */
/* One method on channel 0. Fills *event and answers true when the user must know. */
bool mr_connection_method(mr_engine *e, amqp_method_number_t method, amqp_bytes_t args,
                          mr_event *event);
/* Whether the peer's first bytes can belong to a broker; ends the connection when not. */
bool mr_greeting_ok(mr_engine *e);

/* ---- channel.c ---- */
mr_channel *mr_find_channel(const mr_engine *e, uint16_t id);
/* Whether the broker has closed the last channel of this number: more may come that it sent before it
 * had our answer. */
bool mr_is_retired(const mr_engine *e, uint16_t id);
/* Whether the channel is open, or will be, and not closing. */
bool mr_takes_commands(const mr_channel *ch);
/* The number becomes free; the handle is freed if the user gave it back, else it stays readable. */
void mr_channel_end(mr_channel *ch);

/* ---- replies.c ---- */
/* One method on a channel. Fills *event and answers true when the user must know. */
bool mr_channel_method(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args,
                       mr_event *event);

/* ---- calls.c ---- */
mr_status mr_calls_reserve(mr_calls *calls);
void mr_calls_push(mr_calls *calls, mr_call_entry entry); /* after mr_calls_reserve */
/* Takes the call that `reply` answers: the oldest, but for consume and cancel. */
bool mr_calls_take(mr_calls *calls, amqp_method_number_t reply, mr_call_entry *entry);
void mr_calls_free(mr_calls *calls);

/* ---- consumers.c ---- */
mr_status mr_consumers_add(mr_channel *ch, amqp_bytes_t tag, bool no_ack, uint32_t ref);
/* basic.cancel was sent. */
void mr_consumers_cancel(mr_channel *ch, amqp_bytes_t tag);
/* basic.cancel was answered. */
void mr_consumers_cancelled(mr_channel *ch, amqp_bytes_t tag);
mr_consumer *mr_consumers_find(mr_channel *ch, amqp_bytes_t tag);
/* Takes the last addition back. */
void mr_consumers_undo_add(mr_channel *ch);
void mr_consumers_remove(mr_channel *ch, amqp_bytes_t tag);

/* ---- content.c ---- */
/* A method that brings content: deliver, get-ok, return. */
void mr_content_begin(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args);
bool mr_content_header(mr_channel *ch, amqp_bytes_t payload, mr_event *event);
bool mr_content_body(mr_channel *ch, amqp_bytes_t payload, mr_event *event);
/* Forgets the content that the last event showed. */
void mr_content_reset(mr_channel *ch);
void mr_assembly_free(mr_assembly *a);

/* ---- settle.c ---- */
/* Writes every gathered ack of every channel. */
mr_status mr_flush_all_acks(mr_engine *e);
/* Takes the channel off the list of those with gathered acks. */
void mr_forget_gathered(mr_channel *ch);

#endif
