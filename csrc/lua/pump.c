/*
 * Engine:pump: takes events from the core and does what needs no Lua code.
 *
 * Deliveries go into their DeliveryQueue, acked publishes only mark their channel: both stand in the
 * outbox once, as the queue or channel itself. Failed publishes stand there as their Confirmation.
 * Any other event ends the loop, behind what the outbox holds; nothing more is taken from the core
 * until the outbox is empty. So Lua sees events in the order of the wire, while the hot ones cost no
 * call. Failures do not end the loop, because until their turn has come in the core a nacked publish
 * may read as acked: they are all noted before Lua runs again.
 */
#include "lua/binding.h"

/* The stack during a pump. */
enum { AT_ENGINE = 1, AT_CHANNELS, AT_QUEUES, AT_OUTBOX, AT_ANCHOR, AT_RING, AT_TOP = AT_RING };

typedef struct {
  lua_State *L;
  mrl_engine *engine;
  mrl_queue *queue; /* whose ring is at AT_RING and whose anchor is at AT_ANCHOR; NULL: none */
  mrl_channel *channel;
} pump;

/* ---- the outbox ---- */

/* Pops the value on top of the stack into the outbox. */
static void outbox_put(pump *p) {
  mrl_engine *e = p->engine;
  lua_rawseti(p->L, AT_OUTBOX, ++e->out_last);
}

/* Packs n values on top of the stack into the outbox. */
static void outbox_put_event(pump *p, int n) {
  lua_State *L = p->L;
  int first = lua_gettop(L) - n + 1;
  lua_createtable(L, n + 1, 0);
  lua_pushinteger(L, n);
  lua_rawseti(L, -2, 1);
  for (int i = 0; i < n; i++) {
    lua_pushvalue(L, first + i);
    lua_rawseti(L, -2, i + 2);
  }
  outbox_put(p);
  lua_settop(L, first - 1);
}

/* Pushes the oldest entry of the outbox, which loses it; false: there is none. */
static bool outbox_take(pump *p) {
  mrl_engine *e = p->engine;
  if (e->out_first > e->out_last) {
    e->out_first = 1;
    e->out_last = 0;
    return false;
  }
  lua_rawgeti(p->L, AT_OUTBOX, e->out_first);
  lua_pushnil(p->L);
  lua_rawseti(p->L, AT_OUTBOX, e->out_first++);
  return true;
}

/* ---- emitting: the entry is on top of the stack; returns the number of results, 0: nothing ---- */

static int emit_packed(lua_State *L) {
  int entry = lua_gettop(L);
  lua_rawgeti(L, entry, 1);
  int n = (int)lua_tointeger(L, -1);
  for (int i = 0; i < n; i++) lua_rawgeti(L, entry, i + 2);
  return n;
}

static int emit_deliver(lua_State *L, mrl_queue *q) {
  int entry = lua_gettop(L);
  q->announced = false;
  if (q->count == 0) return 0;
  lua_pushliteral(L, "deliver");
  mr_get_uservalue(L, entry);
  lua_rawgeti(L, -1, MR_RING_ANCHOR);
  lua_rawgeti(L, -1, MR_ANCHOR_OWNER);
  lua_replace(L, -3);
  lua_pop(L, 1);
  lua_pushvalue(L, entry);
  return 3;
}

/* Pushes the owner of the channel or confirmation at `entry`. */
static void push_owner_of(lua_State *L, int entry) {
  mr_get_uservalue(L, entry);
  lua_rawgeti(L, -1, MR_ANCHOR_OWNER);
  lua_replace(L, -2);
}

static int emit_confirm(lua_State *L, mrl_channel *channel) {
  int entry = lua_gettop(L);
  channel->dirty = false;
  lua_pushliteral(L, "confirm");
  push_owner_of(L, entry);
  return 2;
}

static int emit_failed(lua_State *L, const mrl_confirmation *c) {
  int entry = lua_gettop(L);
  lua_pushliteral(L, "failed");
  push_owner_of(L, entry);
  mr_push_int64(L, (int64_t)c->seq);
  lua_pushstring(L, c->outcome == MR_NACKED ? "nacked" : "unroutable");
  lua_pushvalue(L, entry);
  return 5;
}

static int emit(lua_State *L) {
  void *entry = lua_touserdata(L, -1);
  if (!entry) return emit_packed(L);
  mrl_tag tag = *(const mrl_tag *)entry;
  if (tag == MR_IS_QUEUE) return emit_deliver(L, entry);
  if (tag == MR_IS_CHANNEL) return emit_confirm(L, entry);
  return emit_failed(L, entry);
}

/* The results for the oldest entry that has something to say; 0: the outbox is empty. */
static int emit_next(pump *p) {
  while (outbox_take(p)) {
    int n = emit(p->L);
    if (n) return n;
    lua_settop(p->L, AT_TOP);
  }
  return 0;
}

/* ---- finding what an event is about ---- */

/* Puts the anchor of the event's channel to AT_ANCHOR; false: nobody knows that channel. */
static bool select_channel(pump *p, mr_channel *handle) {
  lua_State *L = p->L;
  mrl_channel *channel = handle ? mr_channel_user(handle) : NULL;
  if (channel && channel == p->channel) return true;
  p->queue = NULL;
  p->channel = NULL;
  if (!channel) return false;
  lua_rawgeti(L, AT_CHANNELS, channel->id);
  bool known = lua_istable(L, -1);
  lua_replace(L, AT_ANCHOR);
  if (known) p->channel = channel;
  return known;
}

/* Puts the ring of the delivery's queue to AT_RING and its anchor to AT_ANCHOR. */
static bool select_queue(pump *p, const mr_event *event) {
  lua_State *L = p->L;
  if (p->queue && p->queue->ref == event->content.consumer_ref) return true;
  if (!select_channel(p, event->channel)) return false;
  p->queue = NULL;
  lua_rawgeti(L, AT_QUEUES, (int)event->content.consumer_ref);
  mrl_queue *q = lua_touserdata(L, -1);
  if (q) {
    mr_get_uservalue(L, -1);
    lua_replace(L, AT_RING);
    p->queue = q;
  }
  lua_pop(L, 1);
  return q != NULL;
}

/* Pushes the owner of the event's channel, or nil. */
static void push_owner(pump *p, mr_channel *handle) {
  if (select_channel(p, handle))
    lua_rawgeti(p->L, AT_ANCHOR, MR_ANCHOR_OWNER);
  else
    lua_pushnil(p->L);
}

/* ---- the hot events ---- */

/* A delivery that nobody wants goes back to the broker. */
static void return_delivery(const mr_event *event) {
  const mr_content *c = &event->content;
  if (!c->no_ack && event->channel)
    mr_settle(event->channel, c->delivery_tag, MR_SETTLE_NACK, true);
}

static void push_queue_userdata(pump *p) { lua_rawgeti(p->L, AT_QUEUES, (int)p->queue->ref); }

/* Input waits from now on; what has been received already is still taken. */
static void hold_input(pump *p) {
  mrl_queue *q = p->queue;
  p->engine->admitted = false;
  if (q->full) return;
  q->full = true;
  p->engine->n_full++;
}

static void deliver(pump *p, const mr_event *event) {
  lua_State *L = p->L;
  if (MR_UNLIKELY(!select_queue(p, event)) || MR_UNLIKELY(p->queue->discarding)) {
    return_delivery(event);
    return;
  }
  mrl_queue *q = p->queue;
  size_t len = event->content.body.len;
  mrl_message_new(L, event, p->channel, AT_ANCHOR);
  if (MR_UNLIKELY(q->count == q->capacity)) {
    push_queue_userdata(p);
    mrl_queue_grow(L, q, lua_gettop(L), AT_RING);
    lua_pop(L, 1);
  }
  mrl_queue_put(L, q, AT_RING, len);
  if (MR_UNLIKELY(q->count == 1) && !q->announced) {
    q->announced = true;
    push_queue_userdata(p);
    outbox_put(p);
  }
  if (MR_UNLIKELY(mrl_queue_is_over(q))) hold_input(p);
}

static void confirm_acked(pump *p, const mr_event *event) {
  lua_State *L = p->L;
  mrl_channel *channel = event->channel ? mr_channel_user(event->channel) : NULL;
  if (!channel || channel->dirty || !select_channel(p, event->channel)) return;
  channel->dirty = true;
  lua_rawgeti(L, AT_ANCHOR, MR_ANCHOR_CHANNEL);
  outbox_put(p);
}

static void confirm_failed(pump *p, const mr_event *event) {
  lua_State *L = p->L;
  uint64_t seq = event->confirm.first;
  if (!select_channel(p, event->channel) || !p->channel->pending_capacity) return;
  lua_rawgeti(L, AT_ANCHOR, MR_ANCHOR_PENDING);
  lua_rawgeti(L, -1, (int)(seq & (p->channel->pending_capacity - 1)) + 1);
  mrl_confirmation *c = lua_touserdata(L, -1);
  if (c && c->seq == seq) {
    c->outcome = (uint8_t)event->confirm.outcome;
    outbox_put(p);
  }
  lua_settop(L, AT_TOP);
}

static void confirm(pump *p, const mr_event *event) {
  if (event->confirm.outcome == MR_ACKED)
    confirm_acked(p, event);
  else
    confirm_failed(p, event);
}

/* ---- the others: push their results, return how many ---- */

/* A channel ended: forget it, but for the anchor, which its messages keep. */
static void forget_channel(pump *p, mr_channel *handle) {
  lua_State *L = p->L;
  if (!select_channel(p, handle)) return;
  mrl_forget_channel(L, AT_ANCHOR, AT_QUEUES);
  lua_pushnil(L);
  lua_rawseti(L, AT_CHANNELS, p->channel->id);
  p->channel = NULL;
  p->queue = NULL;
}

static void forget_everything(pump *p) {
  lua_State *L = p->L;
  mr_get_uservalue(L, AT_ENGINE);
  for (int slot = MR_ENGINE_CHANNELS; slot <= MR_ENGINE_QUEUES; slot++) {
    lua_newtable(L);
    lua_rawseti(L, -2, slot);
  }
  lua_pop(L, 1);
  p->channel = NULL;
  p->queue = NULL;
}

/* Pushes the queue of a consumer that ended, or nil. */
static void take_queue(pump *p, mr_channel *handle, amqp_bytes_t tag, bool only_ending) {
  if (select_channel(p, handle))
    mrl_take_queue(p->L, AT_ANCHOR, AT_QUEUES, tag, only_ending);
  else
    lua_pushnil(p->L);
  p->queue = NULL;
}

static int on_reply(pump *p, const mr_event *event) {
  lua_State *L = p->L;
  lua_pushliteral(L, "reply");
  push_owner(p, event->channel);
  mrl_push_method_name(L, event->method.id);
  mrl_push_method_fields(L, &event->method);
  if (event->method.id == AMQP_CHANNEL_CLOSE_OK_METHOD) forget_channel(p, event->channel);
  if (event->method.id == AMQP_BASIC_CANCEL_OK_METHOD) {
    const amqp_basic_cancel_ok_t *ok = event->method.decoded;
    take_queue(p, event->channel, ok->consumer_tag, true);
    lua_pop(L, 1);
  }
  return 4;
}

static int on_get(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "get");
  push_owner(p, event->channel);
  if (p->channel)
    mrl_message_new(p->L, event, p->channel, AT_ANCHOR);
  else
    lua_pushnil(p->L);
  return 3;
}

static int on_return(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "return");
  push_owner(p, event->channel);
  if (p->channel)
    mrl_message_new(p->L, event, p->channel, AT_ANCHOR);
  else
    lua_pushnil(p->L);
  if (event->content.seq == 0) return 3;
  mr_push_int64(p->L, (int64_t)event->content.seq);
  return 4;
}

static int on_cancel(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "cancel");
  push_owner(p, event->channel);
  mrl_push_bytes(p->L, event->consumer_tag);
  take_queue(p, event->channel, event->consumer_tag, false);
  return 4;
}

static int on_flow(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "flow");
  push_owner(p, event->channel);
  lua_pushboolean(p->L, event->active);
  return 3;
}

static int on_channel_closed(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "channel_closed");
  push_owner(p, event->channel);
  mrl_push_error(p->L, &event->error);
  forget_channel(p, event->channel);
  return 3;
}

static int on_closed(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "closed");
  mrl_push_error(p->L, &event->error);
  forget_everything(p);
  return 2;
}

static int on_blocked(pump *p, const mr_event *event) {
  lua_pushliteral(p->L, "blocked");
  mrl_push_bytes(p->L, event->text);
  return 2;
}

static int on_event(pump *p, const mr_event *event) {
  switch (event->type) {
    case MR_EV_OPEN: lua_pushliteral(p->L, "open"); return 1;
    case MR_EV_REPLY: return on_reply(p, event);
    case MR_EV_GET_OK: return on_get(p, event);
    case MR_EV_RETURN: return on_return(p, event);
    case MR_EV_CONSUMER_CANCEL: return on_cancel(p, event);
    case MR_EV_FLOW: return on_flow(p, event);
    case MR_EV_CHANNEL_CLOSED: return on_channel_closed(p, event);
    case MR_EV_BLOCKED: return on_blocked(p, event);
    case MR_EV_UNBLOCKED: lua_pushliteral(p->L, "unblocked"); return 1;
    default: return on_closed(p, event);
  }
}

/* ---- the loop ---- */

/* Takes events until one must go to Lua (its results are pushed) or none is left. */
static int take_events(pump *p) {
  mr_event event;
  for (;;) {
    switch (mr_engine_next(p->engine->handle, &event)) {
      case MR_EV_NONE: return 0;
      case MR_EV_DELIVER: deliver(p, &event); break;
      case MR_EV_CONFIRM: confirm(p, &event); break;
      default: return on_event(p, &event);
    }
  }
}

static int pump_once(pump *p) {
  int n = emit_next(p);
  if (n) return n;
  n = take_events(p);
  if (n == 0) return emit_next(p);
  if (p->engine->out_first > p->engine->out_last) return n;
  outbox_put_event(p, n);
  return emit_next(p);
}

/* An error in a pump (out of memory) loses an event, so the engine stays `busy`: it is of no use. */
int mrl_pump(lua_State *L) {
  pump p = {L, mrl_check_engine(L, 1), NULL, NULL};
  if (p.engine->busy)
    return luaL_error(L, "pump: called from within itself, or after it has failed");
  lua_settop(L, 1);
  mr_get_uservalue(L, AT_ENGINE);
  for (int slot = MR_ENGINE_CHANNELS; slot <= MR_ENGINE_OUTBOX; slot++) lua_rawgeti(L, 2, slot);
  lua_remove(L, 2);
  lua_pushnil(L);
  lua_pushnil(L);
  p.engine->busy = true;
  int n = pump_once(&p);
  p.engine->busy = false;
  return n;
}

/* ---- errors ---- */

static const char *kind_name(mr_kind kind) {
  switch (kind) {
    case MR_KIND_PROTOCOL: return "protocol";
    case MR_KIND_AUTH: return "auth";
    case MR_KIND_VHOST: return "vhost";
    case MR_KIND_TIMEOUT: return "timeout";
    case MR_KIND_CHANNEL: return "channel";
    case MR_KIND_BLOCKED: return "blocked";
    case MR_KIND_MEMORY: return "memory";
    default: return "closed";
  }
}

static void set_number(lua_State *L, const char *name, unsigned n) {
  if (!n) return;
  lua_pushinteger(L, (lua_Integer)n);
  lua_setfield(L, -2, name);
}

void mrl_push_error(lua_State *L, const mr_error *err) {
  lua_createtable(L, 0, 5);
  lua_pushstring(L, kind_name(err->kind));
  lua_setfield(L, -2, "kind");
  lua_pushstring(L, err->text);
  lua_setfield(L, -2, "text");
  set_number(L, "code", err->code);
  set_number(L, "class", err->class_id);
  set_number(L, "method", err->method_id);
}
