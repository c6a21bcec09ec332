/* Channel:publish, routes and forward. Memory of Lua is allocated before anything is read or sent. */
#include <stdlib.h>

#include "lua/binding.h"

/* ---- confirmations ---- */

/* The unsettled move to their new places in a table as large as the core's ring. Making it may run
 * finalizers, and those may publish; so the ring is looked at again afterwards. */
static void grow_pending(lua_State *L, mrl_channel *channel, int anchor) {
  uint64_t capacity = mr_confirm_capacity(channel->handle);
  lua_createtable(L, (int)capacity, 0);
  if (!channel->handle || capacity != mr_confirm_capacity(channel->handle)) {
    lua_pop(L, 1);
    return;
  }
  uint64_t last = mr_confirm_next(channel->handle);
  uint64_t old = channel->pending_capacity;
  lua_rawgeti(L, anchor, MR_ANCHOR_PENDING);
  for (uint64_t seq = mr_confirm_oldest(channel->handle); old && seq < last; seq++) {
    lua_rawgeti(L, -1, (int)(seq & (old - 1)) + 1);
    lua_rawseti(L, -3, (int)(seq & (capacity - 1)) + 1);
  }
  lua_pop(L, 1);
  lua_rawseti(L, anchor, MR_ANCHOR_PENDING);
  channel->pending_capacity = capacity;
}

static bool needs_place(const mrl_channel *channel) {
  return channel->handle && mr_confirm_held(channel->handle) >= channel->pending_capacity;
}

/* A place among the pending for the next publish, made while that is not sent yet, for it may throw.
 * A full window has none: the core says so when it is to publish. The anchor and a confirmation are on
 * top of the stack. */
static void make_place(lua_State *L, mrl_channel *channel) {
  while (needs_place(channel)) {
    mr_status status = mr_confirm_reserve(channel->handle);
    if (status == MR_NO_MEMORY) luaL_error(L, "not enough memory");
    if (status < 0) return;
    grow_pending(L, channel, lua_gettop(L) - 1);
  }
}

/* Pushes the anchor of the channel at index 1 and a new confirmation. */
static mrl_confirmation *new_confirmation(lua_State *L, mrl_channel *channel) {
  mr_get_uservalue(L, 1);
  mrl_confirmation *c = mr_new_userdata(L, sizeof *c);
  *c = (mrl_confirmation){.tag = MR_IS_CONFIRMATION, .outcome = MR_PENDING, .channel = channel};
  lua_pushvalue(L, -2);
  mr_set_uservalue(L, -2);
  lua_pushvalue(L, lua_upvalueindex(MR_UP_CONFIRMATION));
  lua_setmetatable(L, -2);
  return c;
}

static bool has_confirms(const mrl_channel *channel) {
  return channel->handle && mr_channel_is_confirm(channel->handle);
}

/* Pushes the channel's anchor and a confirmation for its next publish, which then has a place, or
 * nothing when it has no confirms. The channel is at index 1. */
static mrl_confirmation *push_confirmation(lua_State *L, mrl_channel *channel) {
  if (!has_confirms(channel)) return NULL;
  mrl_confirmation *c = new_confirmation(L, channel);
  if (MR_UNLIKELY(needs_place(channel))) make_place(L, channel);
  return c;
}

/* Channel:hold(number): the held confirmation of what is yet to be published. */
int mrl_hold(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  uint64_t number = mrl_check_uint(L, 2, INT64_MAX);
  mrl_confirmation *c = new_confirmation(L, channel);
  c->outcome = MR_LOST;
  c->held = true;
  c->number = number;
  return 1;
}

/* The same for a publisher that may publish again: `i` is the index of its own number (or nil), and
 * behind it that of the confirmation of the publish before (or nil), which is then used again. */
static mrl_confirmation *push_held(lua_State *L, mrl_channel *channel, int i) {
  mrl_confirmation *c;
  if (lua_isnil(L, i)) return push_confirmation(L, channel);
  uint64_t number = mrl_check_uint(L, i, INT64_MAX);
  if (lua_isnil(L, i + 1)) {
    c = push_confirmation(L, channel);
  } else {
    c = mrl_check_tag(L, i + 1, MR_IS_CONFIRMATION, sizeof *c);
    if (!has_confirms(channel)) return NULL;
    mr_get_uservalue(L, 1);
    lua_pushvalue(L, i + 1);
    if (MR_UNLIKELY(needs_place(channel))) make_place(L, channel);
  }
  if (c) {
    c->held = true;
    c->number = number;
  }
  return c;
}

/* The results of a publish; the anchor and the confirmation, if any, stand behind index `top`. What is
 * sent is noted: nothing here throws. */
static int finish(lua_State *L, int top, mrl_channel *channel, mrl_confirmation *c,
                  mr_status status, uint64_t seq) {
  if (MR_UNLIKELY(status < 0)) return mrl_push_refusal(L, status);
  if (c) {
    if (MR_UNLIKELY(c->channel != channel)) {
      lua_pushvalue(L, top + 1);
      mr_set_uservalue(L, top + 2);
      c->channel = channel;
    }
    c->outcome = MR_PENDING;
    c->seq = seq;
    lua_rawgeti(L, top + 1, MR_ANCHOR_PENDING);
    lua_pushvalue(L, top + 2);
    lua_rawseti(L, -2, (int)(seq & (channel->pending_capacity - 1)) + 1);
    lua_pushvalue(L, top + 2);
  } else {
    lua_pushboolean(L, 1);
  }
  lua_pushboolean(L, status == MR_FLUSH);
  return 2;
}

/* ---- publish ---- */

/* The position is that of who called the library's function. */
static amqp_bytes_t check_body(lua_State *L, int i) {
  if (MR_UNLIKELY(lua_type(L, i) != LUA_TSTRING)) {
    luaL_where(L, 2);
    lua_pushfstring(L, "publish: body: string expected, got %s", luaL_typename(L, i));
    lua_concat(L, 2);
    lua_error(L);
  }
  return mrl_check_string(L, i);
}

int mrl_publish(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  mr_publish_args args;
  mrl_options options;
  uint8_t room[MR_PROPS_ROOM];
  uint64_t seq = 0;
  args.body = check_body(L, 2);
  lua_settop(L, 3);
  mrl_confirmation *c = push_confirmation(L, channel);
  mrl_state *st = mrl_get_state(L);
  mrl_read_options(L, st, 3, c != NULL, &options);
  if (MR_UNLIKELY(!channel->handle)) return mrl_push_refusal(L, MR_CLOSED);
  mr_status status = mrl_encode_props(st, &options, room, &args.props);
  args.exchange = options.exchange;
  args.routing_key = options.routing_key;
  args.mandatory = options.mandatory;
  if (status == MR_OK) status = mr_publish(channel->handle, &args, &seq);
  return finish(L, 3, channel, c, status, seq);
}

/* ---- routes ---- */

static mrl_route *check_route(lua_State *L, int i) {
  return mrl_check(L, i, MR_UP_ROUTE, MR_ROUTE_TYPE);
}

int mrl_new_route(lua_State *L) {
  mrl_state *st = mrl_get_state(L);
  mr_publish_args args;
  mrl_options options;
  uint8_t room[MR_PROPS_ROOM];
  bool confirm = mrl_opt_boolean(L, 2, false);
  mrl_route *route = lua_newuserdata(L, sizeof *route);
  route->handle = NULL;
  lua_pushvalue(L, lua_upvalueindex(MR_UP_ROUTE));
  lua_setmetatable(L, -2);
  mrl_read_options(L, st, 1, confirm, &options);
  args.exchange = options.exchange;
  args.routing_key = options.routing_key;
  args.mandatory = options.mandatory;
  args.body = mrl_bytes(NULL, 0);
  mr_status status = mrl_encode_props(st, &options, room, &args.props);
  if (status == MR_OK) status = mr_route_new(&args, &route->handle);
  if (status < 0) return luaL_error(L, "route: %s", mr_status_text(status));
  return 1;
}

static int route_gc(lua_State *L) {
  mrl_route *route = check_route(L, 1);
  mr_route_free(route->handle);
  route->handle = NULL;
  return 0;
}

int mrl_publish_route(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  const mrl_route *route = check_route(L, 2);
  amqp_bytes_t body = check_body(L, 3);
  uint64_t seq = 0;
  lua_settop(L, 5);
  mrl_confirmation *c = push_held(L, channel, 4);
  if (!channel->handle || !route->handle) return mrl_push_refusal(L, MR_CLOSED);
  mr_status status = c && c->number ? mr_route_stamp(route->handle, c->number) : MR_OK;
  if (status == MR_OK) status = mr_publish_route(channel->handle, route->handle, body, &seq);
  return finish(L, 5, channel, c, status, seq);
}

const luaL_Reg mrl_route_functions[] = {{"__gc", route_gc}, {NULL, NULL}};

/* ---- packed ---- */

/* core.pack(opts, confirm): what a publish with these options is made of, as strings. */
int mrl_pack(lua_State *L) {
  mrl_state *st = mrl_get_state(L);
  mrl_options options;
  uint8_t room[MR_PROPS_ROOM];
  amqp_bytes_t props;
  bool confirm = mrl_opt_boolean(L, 2, false);
  mrl_read_options(L, st, 1, confirm, &options);
  mr_status status = mrl_encode_props(st, &options, room, &props);
  if (status < 0) return mrl_push_refusal(L, status);
  mrl_push_bytes(L, options.exchange);
  mrl_push_bytes(L, options.routing_key);
  lua_pushboolean(L, options.mandatory);
  mrl_push_bytes(L, props);
  return 4;
}

/* core.set_headers(props, set): packed properties with headers added or replaced. */
int mrl_set_headers(lua_State *L) {
  mrl_state *st = mrl_get_state(L);
  amqp_bytes_t props = mrl_check_string(L, 1);
  amqp_table_t set;
  uint8_t *edited;
  size_t len;
  static const uint8_t none[2] = {0, 0};
  if (props.len == 0) props = mrl_bytes(none, sizeof none);
  mrl_arena_reset(&st->arena);
  mrl_to_table(L, 2, "set", false, &set);
  if (mr_props_check(props)) return mrl_push_refusal(L, MR_BAD_ARGUMENT);
  mr_status status = mr_props_edit(props, NULL, 0, &set, &edited, &len);
  if (status != MR_OK) return mrl_push_refusal(L, status);
  uint8_t *scratch = mrl_scratch(st, len);
  if (scratch) memcpy(scratch, edited, len);
  free(edited); /* before anything of Lua can throw */
  if (!scratch) return mrl_push_refusal(L, MR_NO_MEMORY);
  lua_pushlstring(L, (const char *)scratch, len);
  return 1;
}

/* Channel:publish_packed(exchange, routing_key, mandatory, props, body, number, again) */
int mrl_publish_packed(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  mr_publish_args args = {.exchange = mrl_check_shortstr(L, 2),
                          .routing_key = mrl_check_shortstr(L, 3),
                          .mandatory = mrl_check_boolean(L, 4),
                          .props = mrl_check_string(L, 5),
                          .body = check_body(L, 6)};
  uint64_t seq = 0;
  lua_settop(L, 8);
  mrl_confirmation *c = push_held(L, channel, 7);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  mr_status status = mr_publish(channel->handle, &args, &seq);
  return finish(L, 8, channel, c, status, seq);
}

/* ---- forward ---- */

/* Names in the array at `i` (or nil), with room for one more, in the arena. */
static amqp_bytes_t *read_names(lua_State *L, mrl_state *st, int i, size_t *n) {
  *n = 0;
  if (!lua_isnoneornil(L, i)) {
    luaL_checktype(L, i, LUA_TTABLE);
    *n = (size_t)lua_rawlen(L, i);
  }
  amqp_bytes_t *names = mrl_arena_alloc(L, &st->arena, (*n + 1) * sizeof *names);
  for (size_t k = 0; k < *n; k++) {
    lua_rawgeti(L, i, (int)k + 1);
    if (lua_type(L, -1) != LUA_TSTRING) luaL_argerror(L, i, "an array of strings expected");
    names[k] = mrl_check_string(L, -1);
    lua_pop(L, 1);
  }
  return names;
}

/* The flags of the properties named in the array at `i` (or nil). */
static amqp_flags_t read_flags(lua_State *L, mrl_state *st, int i) {
  size_t n;
  amqp_flags_t flags = 0;
  amqp_bytes_t *names = read_names(L, st, i, &n);
  for (size_t k = 0; k < n; k++) {
    amqp_flags_t flag = mrl_property_flag(names[k].bytes);
    if (!flag)
      luaL_argerror(L, i,
                    lua_pushfstring(L, "unknown property '%s'", (const char *)names[k].bytes));
    flags |= flag;
  }
  return flags;
}

typedef struct {
  amqp_bytes_t *remove; /* in the arena */
  size_t n_remove;
  amqp_table_t set; /* in the arena */
  amqp_flags_t without;
} edits;

static void read_edits(lua_State *L, mrl_state *st, edits *e) {
  static const char seq[] = MR_SEQ_HEADER;
  mrl_arena_reset(&st->arena);
  e->set.num_entries = 0;
  if (!lua_isnoneornil(L, 6)) mrl_to_table(L, 6, "set", false, &e->set);
  e->without = read_flags(L, st, 8);
  e->remove = read_names(L, st, 7, &e->n_remove);
  e->remove[e->n_remove++] = mrl_bytes(seq, sizeof seq - 1);
}

/* Edits the raw properties, sends, and frees: nothing of Lua is called in between. */
static mr_status send_edited(mrl_state *st, mr_channel *handle, mr_publish_args *args,
                             const edits *e, uint64_t *seq) {
  uint8_t *edited;
  size_t len;
  if (e->without) {
    uint8_t *bytes = mrl_scratch(st, args->props.len + 1);
    if (!bytes) return MR_NO_MEMORY;
    args->props = mrl_bytes(bytes, mrl_strip_props(args->props, e->without, bytes));
  }
  mr_status status = mr_props_edit(args->props, e->remove, e->n_remove, &e->set, &edited, &len);
  if (status != MR_OK) return status;
  args->props = mrl_bytes(edited, len);
  status = mr_publish(handle, args, seq);
  free(edited);
  return status;
}

int mrl_forward(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  const mrl_message *m = mrl_check_tag(L, 2, MR_IS_MESSAGE, sizeof *m);
  mrl_state *st = mrl_get_state(L);
  mr_publish_args args;
  edits e;
  uint64_t seq = 0;
  lua_settop(L, 8);
  mrl_confirmation *c = push_confirmation(L, channel);
  args.exchange = mrl_check_shortstr(L, 3);
  args.routing_key = mrl_check_shortstr(L, 4);
  args.mandatory = mrl_opt_boolean(L, 5, c != NULL);
  args.props = mrl_message_props(m);
  args.body = mrl_message_body(L, 2, m);
  read_edits(L, st, &e);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  mr_status status = send_edited(st, channel->handle, &args, &e, &seq);
  return finish(L, 8, channel, c, status, seq);
}
