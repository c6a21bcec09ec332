/*
 * What the files of moonrabbit.core share: the engine of csrc/core bound to Lua.
 *
 * Who keeps whom alive (-> is a strong reference):
 *   engine userdata   -> { channels = id -> anchor, queues = ref -> queue userdata, outbox }
 *   anchor (a table)  -> owner, channel userdata, pending confirmations, engine userdata, tags
 *   channel userdata, confirmation, message -> anchor (before 5.4, a message with a large body: a
 *                       table of its own that leads to the owner and the channel userdata)
 *   queue userdata    -> ring (a table) -> anchor, messages
 * So a message or confirmation alone keeps its channel and engine readable, whatever the client does.
 * When Lua collects all of them at once, it may finalize them in any order: the core allows
 * mr_channel_release after mr_engine_free, and a finalized channel has handle == NULL.
 *
 * Finalizers may run whenever Lua allocates, and may call anything here. So no pointer that another
 * call could invalidate is held across an allocating call of Lua's API: memory for results is
 * allocated first, and while `pump` reads an event the engine is `busy` and takes no input.
 */
#ifndef MOONRABBIT_BINDING_H
#define MOONRABBIT_BINDING_H

#include "core/moonrabbit.h"
#include "lua/compat.h"
#include "lua/port.h"

#define MR_CHANNEL_TYPE "moonrabbit.channel"
#define MR_QUEUE_TYPE "moonrabbit.queue"
#define MR_MESSAGE_TYPE "moonrabbit.message"
#define MR_CONFIRMATION_TYPE "moonrabbit.confirmation"
#define MR_ROUTE_TYPE "moonrabbit.route"
#define MR_TYPED_TYPE "moonrabbit.typed"
#define MR_NULL_TYPE "moonrabbit.null"

/* Every C function of the module has the same upvalues, so that any file can reach them. */
enum {
  MR_UP_STATE = 1, /* mrl_state userdata */
  MR_UP_ENGINE,    /* metatables */
  MR_UP_CHANNEL,
  MR_UP_QUEUE,
  MR_UP_MESSAGE,
  MR_UP_CONFIRMATION,
  MR_UP_ROUTE,
  MR_UP_TYPED,
  MR_UP_NULL,            /* core.null */
  MR_UP_PROPERTIES,      /* weak keys: message -> properties */
  MR_UP_HEADERS,         /* weak keys: message -> headers */
  MR_UP_MESSAGE_METHODS, /* core.message_methods */
  MR_UP_COUNT = MR_UP_MESSAGE_METHODS
};

/* Slots of an anchor; the first three also hold for the table of a message with a large body. */
enum {
  MR_ANCHOR_OWNER = 1,
  MR_ANCHOR_CHANNEL,
  MR_ANCHOR_PENDING,
  MR_ANCHOR_ENGINE,
  MR_ANCHOR_TAGS
};
enum { MR_LARGE_BODY = 3 };

/* Slots of the table kept by an engine userdata. */
enum { MR_ENGINE_CHANNELS = 1, MR_ENGINE_QUEUES, MR_ENGINE_OUTBOX, MR_ENGINE_ASIDE };

/* Slots of a queue's ring table: the anchor, then the messages. */
enum { MR_RING_ANCHOR = 1, MR_RING_FIRST };

/* The first member of every object of the hot paths is an address of ours, which no other library's
 * userdata begins with: far cheaper to look at than a metatable. It also tells apart what stands in the
 * outbox. Set it before anything can throw. */
typedef const char *mrl_tag;
extern const char MR_IS_QUEUE[], MR_IS_CHANNEL[], MR_IS_CONFIRMATION[], MR_IS_MESSAGE[];

/* ---- scratch memory, one per Lua state ---- */

typedef struct mrl_chunk mrl_chunk;

/* A bump allocator for tables on their way to the codec; reset before each use, owned by mrl_state. */
typedef struct {
  mrl_chunk *first;
  mrl_chunk *current;
  size_t used; /* of `current` */
} mrl_arena;

/* Places of interned names: options of a publish, fields of a message. */
enum { MR_KEYS_OPTIONS = 0, MR_KEYS_MESSAGE = 24, MR_MAX_KEYS = 48 };

/* Numbers by chance: see random.c. */
typedef struct {
  uint64_t state, step;
  int pid; /* of the process that seeded it */
} mrl_random;

typedef struct {
  const char *keys[MR_MAX_KEYS]; /* interned names, kept alive by the userdata's uservalue */
  const void *null;              /* core.null */
  mrl_arena arena;
  amqp_pool_t pool; /* for decoding */
  bool pool_busy;
  uint8_t *scratch; /* encoded properties; grows, malloc'ed */
  size_t scratch_size;
  mrl_random random;
} mrl_state;

static inline mrl_state *mrl_get_state(lua_State *L) {
  return lua_touserdata(L, lua_upvalueindex(MR_UP_STATE));
}

/* Pushes the state userdata. state.c */
mrl_state *mrl_state_new(lua_State *L);
void mrl_arena_reset(mrl_arena *arena);
/* Throws when out of memory; valid until the next reset. Aligned for anything. */
void *mrl_arena_alloc(lua_State *L, mrl_arena *arena, size_t size);
/* Room for `size` bytes, or NULL; valid until the next call. */
uint8_t *mrl_scratch(mrl_state *st, size_t size);
/* A pool for one decode, valid until mrl_pool_release. Pushes a value that owns it. */
amqp_pool_t *mrl_pool_acquire(lua_State *L, mrl_state *st);
void mrl_pool_release(mrl_state *st, amqp_pool_t *pool);

/* Interned names: the place of each in mrl_state.keys. */
void mrl_intern(lua_State *L, mrl_state *st, int keys_table, int place, const char *name);
/* The place of `name` among keys[from .. from + n - 1] whose texts are names[0 .. n - 1], or -1. */
int mrl_find_key(const mrl_state *st, const char *name, int from, const char *const *names, int n);

/* ---- objects ---- */

typedef struct {
  mr_port
      port; /* must be first: moonrabbit.net relies on it. ctx is the mr_engine, NULL after gc */
  mr_engine *handle; /* owned */
  bool busy;         /* pump is looking at an event */
  uint32_t next_ref;
  int out_first, out_last; /* the outbox holds [first, last] */
  uint32_t n_full;         /* queues that hold input up */
  bool admitted; /* input is taken all the same, until a full queue gets its next delivery */
  bool told;     /* Lua knows of gathered acks, and has not looked at the output since */
} mrl_engine;

typedef struct {
  mrl_tag tag;
  uint16_t id;
  bool dirty;         /* stands in the outbox for a "confirm" */
  mr_channel *handle; /* owned; NULL once finalized */
  mrl_engine *engine; /* kept alive by the anchor */
  uint64_t pending_capacity;
} mrl_channel;

typedef struct mrl_queue {
  mrl_tag tag;
  mrl_engine *engine; /* kept alive by the ring's anchor */
  uint32_t ref;
  uint32_t head, count, capacity; /* of the ring; capacity is a power of two */
  size_t bytes;                   /* of the bodies in the ring */
  uint32_t prefetch;              /* what the broker was told; 0: nothing, or not known */
  bool announced;                 /* stands in the outbox for a "deliver" */
  bool no_ack;
  bool full;   /* the engine takes no input until it is half empty */
  bool ending; /* being cancelled: never full, or the answer could not be read */
  bool discarding;
} mrl_queue;

typedef struct {
  mrl_tag tag;
  uint8_t outcome; /* MR_PENDING until a failure or an ack is known for good */
  bool held;       /* may be published again: whatever is no ack still counts as pending */
  mrl_channel *channel;
  uint64_t seq;
  uint64_t number; /* the publisher's own; 0: none */
} mrl_confirmation;

typedef struct {
  mrl_tag is;
  mrl_channel *channel;
  uint64_t tag;
  size_t body_len;
  uint32_t props_len;
  uint32_t message_count;
  uint16_t reply_code;
  uint8_t exchange_len, key_len, consumer_len, text_len;
  uint8_t type; /* mr_event_type: MR_EV_DELIVER, MR_EV_GET_OK or MR_EV_RETURN */
  bool redelivered, no_ack, settled;
  bool large;  /* the body is a Lua string kept with the userdata */
  char data[]; /* exchange, routing key, consumer tag, reply text, raw properties, body */
} mrl_message;

typedef struct {
  mr_route *handle; /* owned */
} mrl_route;

/* The userdata at `i` if its metatable is upvalue `up`, else NULL. */
static inline void *mrl_test(lua_State *L, int i, int up) {
  void *p = lua_touserdata(L, i);
  if (MR_UNLIKELY(p == NULL) || !lua_getmetatable(L, i)) return NULL;
  if (!lua_rawequal(L, -1, lua_upvalueindex(up))) p = NULL;
  lua_pop(L, 1);
  return p;
}

/* The same, or throws. */
static inline void *mrl_check(lua_State *L, int i, int up, const char *type) {
  void *p = mrl_test(L, i, up);
  if (MR_UNLIKELY(p == NULL)) luaL_argerror(L, i, lua_pushfstring(L, "%s expected", type));
  return p;
}

/* The object at `i` if it begins with `tag` and has at least `size` bytes, else NULL. */
static inline void *mrl_test_tag(lua_State *L, int i, mrl_tag tag, size_t size) {
  void *p = lua_touserdata(L, i);
  return MR_LIKELY(p && lua_rawlen(L, i) >= size && *(mrl_tag *)p == tag) ? p : NULL;
}

/* The same, or throws. */
static inline void *mrl_check_tag(lua_State *L, int i, mrl_tag tag, size_t size) {
  void *p = mrl_test_tag(L, i, tag, size);
  if (MR_UNLIKELY(p == NULL)) luaL_argerror(L, i, lua_pushfstring(L, "%s expected", tag));
  return p;
}

static inline amqp_bytes_t mrl_bytes(const void *p, size_t len) {
  amqp_bytes_t b = {len, (void *)(uintptr_t)p};
  return b;
}

/* Strictly a string: numbers are not converted. Throws, naming the argument. */
static inline amqp_bytes_t mrl_check_string(lua_State *L, int i) {
  size_t len;
  const char *s;
  if (MR_UNLIKELY(lua_type(L, i) != LUA_TSTRING)) luaL_checktype(L, i, LUA_TSTRING);
  s = lua_tolstring(L, i, &len);
  return mrl_bytes(s, len);
}

static inline void mrl_push_bytes(lua_State *L, amqp_bytes_t b) {
  lua_pushlstring(L, b.bytes ? (const char *)b.bytes : "", b.bytes ? b.len : 0);
}

/* ---- core.c: small helpers ---- */

const char *mrl_status_name(mr_status status);
/* Pushes nil and the status. */
int mrl_push_refusal(lua_State *L, mr_status status);
/* Pushes true, or nil and the status. */
int mrl_push_done(lua_State *L, mr_status status);
/* Pushes true and whether to flush, or nil and the status. */
int mrl_push_flush(lua_State *L, mr_status status);
void mrl_push_uint64(lua_State *L, uint64_t n);
amqp_bytes_t mrl_check_shortstr(lua_State *L, int i);
bool mrl_check_boolean(lua_State *L, int i);
bool mrl_opt_boolean(lua_State *L, int i, bool otherwise);
uint64_t mrl_check_uint(lua_State *L, int i, uint64_t max);
mr_settle_kind mrl_check_settle(lua_State *L, int i, bool with_ack);

/* ---- each file's part of luaopen: fill the metatable (on top of the stack) or the module ---- */

extern const luaL_Reg mrl_core_functions[];         /* core.c */
extern const luaL_Reg mrl_engine_functions[];       /* engine.c: methods and metamethods */
extern const luaL_Reg mrl_channel_functions[];      /* channel.c */
extern const luaL_Reg mrl_queue_functions[];        /* queue.c */
extern const luaL_Reg mrl_message_functions[];      /* message.c: metamethods */
extern const luaL_Reg mrl_confirmation_functions[]; /* confirmation.c: metamethods */
extern const luaL_Reg mrl_route_functions[];        /* publish.c */
extern const luaL_Reg mrl_typed_functions[];        /* typed.c: metamethods */

int mrl_new_engine(lua_State *L);     /* core.engine(config) */
int mrl_pump(lua_State *L);           /* Engine:pump */
int mrl_open_channel(lua_State *L);   /* Engine:open_channel, in channel.c */
int mrl_new_route(lua_State *L);      /* core.route */
int mrl_publish(lua_State *L);        /* Channel:publish */
int mrl_publish_route(lua_State *L);  /* Channel:publish_route */
int mrl_hold(lua_State *L);           /* Channel:hold */
int mrl_pack(lua_State *L);           /* core.pack */
int mrl_set_headers(lua_State *L);    /* core.set_headers */
int mrl_publish_packed(lua_State *L); /* Channel:publish_packed */
int mrl_forward(lua_State *L);        /* Channel:forward */
int mrl_ack(lua_State *L);            /* core.ack */
int mrl_acker(lua_State *L);          /* core.acker */
int mrl_settle(lua_State *L);         /* core.settle */
int mrl_outstanding(lua_State *L);    /* core.outstanding */
int mrl_key_without(lua_State *L);    /* core.key_without */
int mrl_is_message(lua_State *L);     /* core.is_message */
int mrl_outcome(lua_State *L);        /* core.outcome */
int mrl_acked(lua_State *L);          /* core.acked */
int mrl_conclude(lua_State *L);       /* core.conclude */
int mrl_take_acked(lua_State *L);     /* core.take_acked */
int mrl_encode_table(lua_State *L);   /* core.encode_table */
int mrl_decode_table(lua_State *L);   /* core.decode_table */
int mrl_random_number(lua_State *L);  /* core.random */
int mrl_random_bytes(lua_State *L);   /* core.random_bytes */
/* Pushes core.types; the upvalues are the MR_UP_COUNT values from `first_upvalue` on. */
void mrl_push_types(lua_State *L, int first_upvalue);

/* ---- engine.c ---- */

/* The engine at `i`; throws when it is none or has been finalized. */
mrl_engine *mrl_check_engine(lua_State *L, int i);
/* Pushes a table { kind, code, text, class, method }. */
void mrl_push_error(lua_State *L, const mr_error *err);

/* ---- channel.c ---- */

/* The channel at `i`; throws when it is none. */
static inline mrl_channel *mrl_check_channel(lua_State *L, int i) {
  return mrl_check_tag(L, i, MR_IS_CHANNEL, sizeof(mrl_channel));
}
/* Forgets what a channel that ended needs no more; absolute indices of its anchor and of the
 * engine's queues. */
void mrl_forget_channel(lua_State *L, int anchor, int queues);
/* The queue of a consumer tag is about to be cancelled. The channel is at index 1. */
void mrl_end_queue(lua_State *L, amqp_bytes_t consumer_tag);
/* Takes the queue of a consumer tag out of the channel and the engine, and pushes it (or nil). */
void mrl_take_queue(lua_State *L, int anchor, int queues, amqp_bytes_t consumer_tag,
                    bool only_ending);
/* The queue no longer holds input up. */
void mrl_queue_unfill(mrl_queue *q);

/* ---- queue.c ---- */

/* Pushes an empty queue whose messages belong to the channel of the anchor at `anchor`. */
mrl_queue *mrl_queue_new(lua_State *L, int anchor);
/* Makes room for one more; `queue` is the userdata's index, `ring` that of its table, which is
 * replaced in both places. Both absolute. */
void mrl_queue_grow(lua_State *L, mrl_queue *q, int queue, int ring);
/* Pops the message on top of the stack into the ring at `ring`, where there must be room. */
static inline void mrl_queue_put(lua_State *L, mrl_queue *q, int ring, size_t body_len) {
  lua_rawseti(L, ring, MR_RING_FIRST + (int)((q->head + q->count) & (q->capacity - 1)));
  q->count++;
  q->bytes += body_len;
}
/* Whether so much waits that input must stop. */
bool mrl_queue_is_over(const mrl_queue *q);

/* ---- message.c ---- */

extern const char *const mrl_message_keys[]; /* ends with NULL; interned from MR_KEYS_MESSAGE on */
/* Pushes a message; `anchor` is the absolute index of its channel's anchor. */
mrl_message *mrl_message_new(lua_State *L, const mr_event *event, mrl_channel *channel, int anchor);
/* Gives a delivery back to the broker, if it is to be settled at all. */
void mrl_message_return(mrl_message *m);
/* Its raw properties, and its body (for a large one a Lua string that the message keeps). */
amqp_bytes_t mrl_message_props(const mrl_message *m);
amqp_bytes_t mrl_message_body(lua_State *L, int i, const mrl_message *m);

/* ---- values.c ---- */

/* The table at `i` as an AMQP table in the arena (not reset here); throws, naming `name`.
 * `arguments`: integral floats become integers. Its strings stay Lua's. */
void mrl_to_table(lua_State *L, int i, const char *name, bool arguments, amqp_table_t *out);
/* Pushes a Lua table; an entry named `hidden` (may be NULL) is left out. */
void mrl_push_table(lua_State *L, const amqp_table_t *table, const char *hidden);

/* ---- typed.c: values with an exact wire type ---- */

typedef struct {
  uint8_t type;  /* index into the list of types */
  uint8_t scale; /* of a decimal */
  union {
    int64_t i;  /* integers, timestamp, decimal, boolean */
    uint64_t u; /* uint64 */
    double d;   /* float, double */
    size_t len; /* bytes */
  } v;
  char bytes[];
} mrl_typed;

/* Fills *out from a Typed; false: it cannot be sent. Bytes stay the Typed's. */
bool mrl_typed_to_value(const mrl_typed *typed, amqp_field_value_t *out);
/* Pushes a Typed for an integer of wire type 'l' or 'L', or a decimal. */
void mrl_push_typed(lua_State *L, const amqp_field_value_t *value);
/* The number of a Typed timestamp at `i`; false: it is none. */
bool mrl_typed_timestamp(lua_State *L, int i, uint64_t *out);

/* ---- options.c: what publish and route are told ---- */

typedef struct {
  amqp_bytes_t exchange;
  amqp_bytes_t routing_key;
  bool mandatory;
  bool persistent;
  amqp_basic_properties_t props; /* only what props._flags names is set */
  char expiration[24];
} mrl_options;

enum { MR_PROPS_ROOM = 512 };
const char *const *mrl_option_names(int *n);
/* Reads the table (or nil) at `i`; throws, naming the option. Strings stay Lua's, tables are in the
 * arena; no call of Lua's API here allocates. */
void mrl_read_options(lua_State *L, mrl_state *st, int i, bool confirm, mrl_options *out);
/* Encodes into `room` (MR_PROPS_ROOM bytes) or the state's scratch memory. */
mr_status mrl_encode_props(mrl_state *st, const mrl_options *o, uint8_t *room, amqp_bytes_t *out);
/* Pushes a table of the raw properties, with `headers` when there are any. */
void mrl_push_properties(lua_State *L, amqp_bytes_t raw);
/* The bit of a property by its name, 0: unknown. */
amqp_flags_t mrl_property_flag(const char *name);
/* Copies checked raw properties without those in `without` to `out` (as large); returns the length. */
size_t mrl_strip_props(amqp_bytes_t raw, amqp_flags_t without, uint8_t *out);

/* ---- methods.c ---- */

/* Channel:call(method, fields): the work of it. */
int mrl_call(lua_State *L);
/* Fills basic.consume from the table at `i`. */
void mrl_read_consume(lua_State *L, int i, amqp_basic_consume_t *out);
/* Pushes the name of a method, e.g. "queue.declare-ok"; nil when unknown. */
void mrl_push_method_name(lua_State *L, amqp_method_number_t id);
/* Pushes a table with the fields of a reply. */
void mrl_push_method_fields(lua_State *L, const amqp_method_t *sent);

#endif
