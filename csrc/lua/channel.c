/* The Channel userdata. Publishing is in publish.c, Channel:call in methods.c. */
#include "lua/binding.h"

/* Pushes a table with the owner, the channel and the engine (index 1), and keeps it with the channel,
 * which is on top of the stack. */
static void push_anchor(lua_State *L, int owner) {
  int channel = lua_gettop(L);
  lua_createtable(L, 5, 0);
  lua_pushvalue(L, owner);
  lua_rawseti(L, -2, MR_ANCHOR_OWNER);
  lua_pushvalue(L, channel);
  lua_rawseti(L, -2, MR_ANCHOR_CHANNEL);
  lua_newtable(L);
  lua_rawseti(L, -2, MR_ANCHOR_PENDING);
  lua_pushvalue(L, 1);
  lua_rawseti(L, -2, MR_ANCHOR_ENGINE);
  lua_newtable(L);
  lua_rawseti(L, -2, MR_ANCHOR_TAGS);
  lua_pushvalue(L, -1);
  mr_set_uservalue(L, channel);
}

int mrl_open_channel(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  mrl_channel *channel = mr_new_userdata(L, sizeof *channel);
  memset(channel, 0, sizeof *channel);
  channel->tag = MR_IS_CHANNEL;
  channel->engine = e;
  lua_pushvalue(L, lua_upvalueindex(MR_UP_CHANNEL));
  lua_setmetatable(L, -2);
  push_anchor(L, 2);
  mr_status status = mr_channel_open(e->handle, &channel->handle);
  if (status < 0) {
    channel->handle = NULL;
    return mrl_push_refusal(L, status);
  }
  channel->id = mr_channel_id(channel->handle);
  mr_channel_set_user(channel->handle, channel);
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, MR_ENGINE_CHANNELS);
  lua_pushvalue(L, 4);
  lua_rawseti(L, -2, channel->id);
  lua_settop(L, 3);
  return 1;
}

static int channel_gc(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  mr_channel *handle = channel->handle;
  channel->handle = NULL;
  if (!handle) return 0;
  mr_channel_set_user(handle, NULL);
  mr_channel_release(handle);
  return 0;
}

static void end_queue(mrl_queue *q) {
  q->ending = true;
  mrl_queue_unfill(q);
}

void mrl_end_queue(lua_State *L, amqp_bytes_t consumer_tag) {
  int top = lua_gettop(L);
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, MR_ANCHOR_TAGS);
  mrl_push_bytes(L, consumer_tag);
  lua_rawget(L, -2);
  mrl_queue *q = lua_touserdata(L, -1);
  if (q) end_queue(q);
  lua_settop(L, top);
}

void mrl_forget_channel(lua_State *L, int anchor, int queues) {
  lua_rawgeti(L, anchor, MR_ANCHOR_TAGS);
  for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
    mrl_queue *q = lua_touserdata(L, -1);
    end_queue(q);
    lua_pushnil(L);
    lua_rawseti(L, queues, (int)q->ref);
  }
  lua_pop(L, 1);
  lua_newtable(L);
  lua_rawseti(L, anchor, MR_ANCHOR_TAGS);
  lua_newtable(L);
  lua_rawseti(L, anchor, MR_ANCHOR_PENDING);
}

void mrl_take_queue(lua_State *L, int anchor, int queues, amqp_bytes_t consumer_tag,
                    bool only_ending) {
  lua_rawgeti(L, anchor, MR_ANCHOR_TAGS);
  mrl_push_bytes(L, consumer_tag);
  lua_pushvalue(L, -1);
  lua_rawget(L, -3); /* tags, tag, queue */
  mrl_queue *q = lua_touserdata(L, -1);
  if (q && (q->ending || !only_ending)) {
    end_queue(q);
    lua_pushnil(L);
    lua_rawseti(L, queues, (int)q->ref);
    lua_insert(L, -3); /* queue, tags, tag */
    lua_pushnil(L);
    lua_rawset(L, -3);
    lua_pop(L, 1);
    return;
  }
  lua_pop(L, 3);
  lua_pushnil(L);
}

/* ---- consuming ---- */

/* The next reference that no queue of the engine has; 0 is none. */
static uint32_t free_ref(lua_State *L, mrl_engine *e, int queues) {
  for (;;) {
    uint32_t ref = e->next_ref = e->next_ref % INT32_MAX + 1;
    lua_rawgeti(L, queues, (int)ref);
    bool taken = !lua_isnil(L, -1);
    lua_pop(L, 1);
    if (!taken) return ref;
  }
}

/* Pushes the engine's table of queues; the anchor is at `anchor`. */
static void push_queues(lua_State *L, int anchor) {
  lua_rawgeti(L, anchor, MR_ANCHOR_ENGINE);
  mr_get_uservalue(L, -1);
  lua_rawgeti(L, -1, MR_ENGINE_QUEUES);
  lua_replace(L, -3);
  lua_pop(L, 1);
}

/* Stores the queue (index 5) where the pump finds it; the tag is the consumer_tag of index 2. */
static void register_queue(lua_State *L, mrl_engine *e, mrl_queue *q) {
  lua_rawgeti(L, 3, MR_ANCHOR_TAGS);
  lua_getfield(L, 2, "consumer_tag");
  lua_pushvalue(L, -1);
  lua_rawget(L, 6);
  if (!lua_isnil(L, -1))
    luaL_error(L, "basic.consume: consumer_tag '%s' is in use", lua_tostring(L, -2));
  lua_pop(L, 1);
  lua_pushvalue(L, 5);
  lua_rawset(L, 6);
  q->ref = free_ref(L, e, 4);
  lua_pushvalue(L, 5);
  lua_rawseti(L, 4, (int)q->ref);
  lua_settop(L, 5);
}

/* Everything that may throw is done before the command is sent; a refused one is undone. */
static int channel_consume(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  amqp_basic_consume_t consume;
  uint32_t prefetch = lua_isnoneornil(L, 3) ? 0 : (uint32_t)mrl_check_uint(L, 3, UINT16_MAX);
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  mrl_read_consume(L, 2, &consume);
  if (!channel->handle || !mr_channel_is_open(channel->handle))
    return mrl_push_refusal(L, MR_CLOSED);
  mr_get_uservalue(L, 1);
  push_queues(L, 3);
  mrl_queue *q = mrl_queue_new(L, 3);
  q->no_ack = consume.no_ack;
  q->prefetch = prefetch;
  q->engine = channel->engine;
  register_queue(L, channel->engine, q);
  mrl_read_consume(L, 2,
                   &consume); /* again: what allocates may run finalizers, which use the arena */
  mr_status status = channel->handle ? mr_consume(channel->handle, &consume, q->ref) : MR_CLOSED;
  if (status >= 0) return 1;
  mrl_take_queue(L, 3, 4, consume.consumer_tag, false);
  return mrl_push_refusal(L, status);
}

static int channel_get(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  amqp_bytes_t queue = mrl_check_shortstr(L, 2);
  bool no_ack = mrl_opt_boolean(L, 3, false);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  return mrl_push_done(L, mr_get(channel->handle, queue, no_ack));
}

/* ---- settling ---- */

static int channel_settle(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  uint64_t tag = mrl_check_uint(L, 2, INT64_MAX);
  mr_settle_kind kind = mrl_check_settle(L, 3, true);
  bool requeue = mrl_opt_boolean(L, 4, false);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  return mrl_push_flush(L, mr_settle(channel->handle, tag, kind, requeue));
}

static int channel_settle_upto(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  uint64_t tag = mrl_check_uint(L, 2, INT64_MAX);
  mr_settle_kind kind = mrl_check_settle(L, 3, true);
  bool requeue = mrl_opt_boolean(L, 4, false);
  if (kind == MR_SETTLE_REJECT) return luaL_argerror(L, 3, "'ack' or 'nack' expected");
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  return mrl_push_flush(L, mr_settle_upto(channel->handle, tag, kind, requeue));
}

static int channel_flush_acks(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  return mrl_push_done(L, mr_flush_acks(channel->handle));
}

static int channel_unsettled(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  mr_push_int64(L, channel->handle ? (int64_t)mr_unsettled(channel->handle) : 0);
  return 1;
}

/* ---- the rest ---- */

static int channel_id(lua_State *L) {
  lua_pushinteger(L, mrl_check_channel(L, 1)->id);
  return 1;
}

static int channel_is_open(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  lua_pushboolean(L, channel->handle && mr_channel_is_open(channel->handle));
  return 1;
}

static int channel_close(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  uint16_t code =
      lua_isnoneornil(L, 2) ? AMQP_REPLY_SUCCESS : (uint16_t)mrl_check_uint(L, 2, UINT16_MAX);
  const char *text = lua_isnoneornil(L, 3) ? "" : mrl_check_shortstr(L, 3).bytes;
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  return mrl_push_done(L, mr_channel_close(channel->handle, code, text));
}

static int channel_set_window(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  uint32_t window = (uint32_t)mrl_check_uint(L, 2, UINT32_MAX);
  if (channel->handle) mr_channel_set_window(channel->handle, window);
  return 0;
}

static int channel_unconfirmed(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  mr_push_int64(L, channel->handle ? (int64_t)mr_confirm_unsettled(channel->handle) : 0);
  return 1;
}

static int channel_lost(lua_State *L) {
  const mrl_channel *channel = mrl_check_channel(L, 1);
  mr_push_int64(L, channel->handle ? (int64_t)mr_confirm_lost(channel->handle) : 0);
  return 1;
}

const luaL_Reg mrl_channel_functions[] = {{"id", channel_id},
                                          {"is_open", channel_is_open},
                                          {"call", mrl_call},
                                          {"consume", channel_consume},
                                          {"get", channel_get},
                                          {"close", channel_close},
                                          {"publish", mrl_publish},
                                          {"publish_route", mrl_publish_route},
                                          {"publish_packed", mrl_publish_packed},
                                          {"hold", mrl_hold},
                                          {"forward", mrl_forward},
                                          {"set_window", channel_set_window},
                                          {"unconfirmed", channel_unconfirmed},
                                          {"lost", channel_lost},
                                          {"settle", channel_settle},
                                          {"settle_upto", channel_settle_upto},
                                          {"flush_acks", channel_flush_acks},
                                          {"unsettled", channel_unsettled},
                                          {"__gc", channel_gc},
                                          {NULL, NULL}};
