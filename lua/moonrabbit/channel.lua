--- A channel: declares, publishes, consumes, settles.
--
-- Every method that waits for the broker takes `timeout` among its options (seconds, default: the
-- connection's, 30) and returns `nil, err` on failure: `timeout` (the outcome is unknown; a late
-- answer is dropped), `channel` (the broker closed the channel: err.code says why, and every other
-- call that was waiting on it gets the same error), `closed`.
--
-- The words are AMQP's: https://www.rabbitmq.com/amqp-0-9-1-reference
-- @module moonrabbit.channel

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local Session = require "moonrabbit.session"

local Calls = Session.Calls
local core_acked, core_outcome = core.acked, core.outcome
local huge = math.huge
local check, argument = options.check, options.argument
local shortstr, boolean, seconds, integer = options.shortstr, options.boolean, options.seconds, options.integer

---@class moonrabbit.Channel
---@field connection moonrabbit.Connection
---@field timeout number         seconds; the default of this channel's methods
---@field confirm boolean        whether publishes are confirmed
---@field package _core moonrabbit.core.Channel
---@field package _session moonrabbit.Session
local Channel = {}
Channel.__index = Channel
Channel.__name = "moonrabbit.Channel"

-- How many failed publishes are kept for wait_for_confirms.
local MAX_FAILURES = 10000
-- Waiters beyond the first unsettled one that are looked at for each batch of confirms.
local SCAN = 256

-- ---- Making one -------------------------------------------------------------------------------------

local channel_options = {
  confirm = boolean,
  prefetch = integer(0, 65535),
  window = integer(0, 4294967295),
  timeout = seconds,
}

-- Options of every call.
local common = { timeout = seconds }
local with_nowait = { timeout = seconds, no_wait = boolean }

local rpc
-- The engine's methods, taken from the first channel.
local core_publish, core_publish_route, core_forward

--- Opens a channel; used by Connection:channel.
---@package
function Channel.open(connection, session, opts, level)
  opts = check("Connection:channel", opts, channel_options, (level or 2) + 1)
  local self = setmetatable({
    connection = connection,
    timeout = opts.timeout or connection.timeout,
    confirm = false,
    _session = session,
    _runtime = session.runtime,
    _calls = Calls.new(),
    _receivers = {},             -- DeliveryQueue -> what takes its deliveries
    _consumers = {},             -- consumer tag -> Consumer
    _room = session.runtime.condition(),    -- publishers that wait for the window
    _settled = session.runtime.condition(), -- wait_for_confirms
    _waiting = {},               -- seq -> waiter
    _order = {}, _head = 1, _tail = 0,      -- waiters as they came; false: gone
    _waiters = 0,
    _spare = {},
    _failures = {}, _failures_lost = 0,
    _prefetch = opts.prefetch,   -- what basic.qos was last told, nil: nothing
    _window = opts.window or 65536,
  }, Channel)
  if session.state ~= "open" then return nil, session.reason or session:error("closed", "the connection is closed") end
  local core_channel, status = session.engine:open_channel(self)
  if not core_channel then return nil, session:refusal(status, "Connection:channel") end
  core_publish = core_publish or core_channel.publish
  core_publish_route = core_publish_route or core_channel.publish_route
  core_forward = core_forward or core_channel.forward
  self._core = core_channel
  session.channels[self] = true
  if opts.window then core_channel:set_window(opts.window) end

  -- All in one go: the answers come in order, the last one says that everything is done.
  local timeout = self.timeout
  local deadline = session.runtime.now() + timeout
  local calls = { session:expect(self._calls, "channel.open") }
  if opts.confirm then
    core_channel:call("confirm.select", {})
    calls[#calls + 1] = session:expect(self._calls, "confirm.select")
  end
  if opts.prefetch then
    core_channel:call("basic.qos", { prefetch_count = opts.prefetch })
    calls[#calls + 1] = session:expect(self._calls, "basic.qos")
  end
  for i = 1, #calls do
    local ok, err = session:await(calls[i], math.max(0, deadline - session.runtime.now()))
    if not ok then
      if not self._closed then
        for j = i + 1, #calls do calls[j].abandoned = true end
        self:_abandon()
      end
      return nil, err
    end
  end
  self.confirm = opts.confirm or false
  return self
end

-- Closes without waiting: what is to be said to the broker is said, whatever it answers is dropped.
function Channel:_abandon()
  if self._closed then return end
  if self._core:close(200, "Goodbye") then
    self._session:expect(self._calls, "channel.close").abandoned = true
  end
  self:_ended(self._session:error("closed", "the channel was closed by this side", { temporary = false }), true)
end

-- ---- Calls ------------------------------------------------------------------------------------------

function Channel:_closed_error()
  return self._closed or self._session.reason or self._session:error("closed", "the channel is closed")
end

-- Sends a method and waits for its reply: fields, or nil, err.
function rpc(self, method, fields, opts, late)
  if self._closed then return nil, self._closed end
  local session = self._session
  local ok, status = self._core:call(method, fields)
  if not ok then
    if status == "closed" then return nil, self:_closed_error() end
    return nil, session:refusal(status, method, 3)
  end
  if fields.nowait then
    session:touch()
    return true
  end
  return session:await(session:expect(self._calls, method, late), opts.timeout or self.timeout)
end

local function done(result, err)
  if result then return true end
  return nil, err
end

-- ---- Exchanges --------------------------------------------------------------------------------------

local exchange_declare_options = options.merge(with_nowait, {
  type = shortstr, passive = boolean, durable = boolean, auto_delete = boolean, internal = boolean,
  arguments = options.table,
})

--- Declares an exchange, or with `passive` only checks that it exists.
--- exchange.declare; 406 when it exists with other properties, 404 when passive and unknown.
---@param exchange string
---@param opts { type: string?, durable: boolean?, auto_delete: boolean?, internal: boolean?, passive: boolean?, arguments: table?, no_wait: boolean?, timeout: number? }? type "direct" by default; the rest false
---@return true|nil, moonrabbit.Error?
function Channel:exchange_declare(exchange, opts)
  argument("Channel:exchange_declare", "exchange", exchange, shortstr)
  opts = check("Channel:exchange_declare", opts, exchange_declare_options)
  return done(rpc(self, "exchange.declare", {
    exchange = exchange, type = opts.type or "direct", passive = opts.passive, durable = opts.durable,
    auto_delete = opts.auto_delete, internal = opts.internal, arguments = opts.arguments, nowait = opts.no_wait,
  }, opts))
end

local exchange_delete_options = options.merge(with_nowait, { if_unused = boolean })

--- Deletes an exchange. exchange.delete; with `if_unused` 406 while something is bound to it.
---@param exchange string
---@param opts { if_unused: boolean?, no_wait: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_delete(exchange, opts)
  argument("Channel:exchange_delete", "exchange", exchange, shortstr)
  opts = check("Channel:exchange_delete", opts, exchange_delete_options)
  return done(rpc(self, "exchange.delete", { exchange = exchange, if_unused = opts.if_unused, nowait = opts.no_wait },
    opts))
end

local bind_options = options.merge(with_nowait, { arguments = options.table })
local unbind_options = options.merge(common, { arguments = options.table })

local function exchange_binding(self, what, method, destination, source, routing_key, opts, valid)
  argument(what, "destination", destination, shortstr, 3)
  argument(what, "source", source, shortstr, 3)
  if routing_key ~= nil then argument(what, "routing_key", routing_key, shortstr, 3) end
  opts = check(what, opts, valid, 3)
  return done(rpc(self, method, {
    destination = destination, source = source, routing_key = routing_key or "", arguments = opts.arguments,
    nowait = opts.no_wait,
  }, opts))
end

--- Binds an exchange to an exchange: what `source` routes there goes on to `destination`.
--- https://www.rabbitmq.com/docs/e2e
---@param destination string
---@param source string
---@param routing_key string?  "" by default
---@param opts { arguments: table?, no_wait: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_bind(destination, source, routing_key, opts)
  local ok, err = exchange_binding(self, "Channel:exchange_bind", "exchange.bind", destination, source, routing_key,
    opts, bind_options)
  return ok, err
end

---@param destination string
---@param source string
---@param routing_key string?
---@param opts { arguments: table?, no_wait: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_unbind(destination, source, routing_key, opts)
  local ok, err = exchange_binding(self, "Channel:exchange_unbind", "exchange.unbind", destination, source, routing_key,
    opts, bind_options)
  return ok, err
end

-- ---- Queues -----------------------------------------------------------------------------------------

local queue_declare_options = options.merge(with_nowait, {
  passive = boolean, durable = boolean, exclusive = boolean, auto_delete = boolean, arguments = options.table,
})

--- Declares a queue, or with `passive` only asks about it. An empty or nil name lets the broker choose one.
--- queue.declare; 406 when it exists with other properties, 405 when it is another connection's
--- exclusive queue, 404 when passive and unknown.
---@param queue string?
---@param opts { durable: boolean?, exclusive: boolean?, auto_delete: boolean?, passive: boolean?, arguments: table?, no_wait: boolean?, timeout: number? }?
---@return { queue: string, message_count: integer, consumer_count: integer }|nil, moonrabbit.Error?
function Channel:queue_declare(queue, opts)
  if queue ~= nil then argument("Channel:queue_declare", "queue", queue, shortstr) end
  opts = check("Channel:queue_declare", opts, queue_declare_options)
  local result, err = rpc(self, "queue.declare", {
    queue = queue or "", passive = opts.passive, durable = opts.durable, exclusive = opts.exclusive,
    auto_delete = opts.auto_delete, arguments = opts.arguments, nowait = opts.no_wait,
  }, opts)
  if result == true then return { queue = queue } end
  return result, err
end

--- Binds a queue to an exchange. queue.bind
---@param queue string
---@param exchange string
---@param routing_key string? "" by default
---@param opts { arguments: table?, no_wait: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:queue_bind(queue, exchange, routing_key, opts)
  argument("Channel:queue_bind", "queue", queue, shortstr)
  argument("Channel:queue_bind", "exchange", exchange, shortstr)
  if routing_key ~= nil then argument("Channel:queue_bind", "routing_key", routing_key, shortstr) end
  opts = check("Channel:queue_bind", opts, bind_options)
  return done(rpc(self, "queue.bind", {
    queue = queue, exchange = exchange, routing_key = routing_key or "", arguments = opts.arguments,
    nowait = opts.no_wait,
  }, opts))
end

--- queue.unbind
---@param queue string
---@param exchange string
---@param routing_key string?
---@param opts { arguments: table?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:queue_unbind(queue, exchange, routing_key, opts)
  argument("Channel:queue_unbind", "queue", queue, shortstr)
  argument("Channel:queue_unbind", "exchange", exchange, shortstr)
  if routing_key ~= nil then argument("Channel:queue_unbind", "routing_key", routing_key, shortstr) end
  opts = check("Channel:queue_unbind", opts, unbind_options)
  return done(rpc(self, "queue.unbind", {
    queue = queue, exchange = exchange, routing_key = routing_key or "", arguments = opts.arguments,
  }, opts))
end

local function counted(result, err)
  if result == true then return true end
  if result then return result.message_count or 0 end
  return nil, err
end

--- Removes every message that is ready. queue.purge
---@param queue string
---@param opts { no_wait: boolean?, timeout: number? }?
---@return integer|true|nil count, moonrabbit.Error?
function Channel:queue_purge(queue, opts)
  argument("Channel:queue_purge", "queue", queue, shortstr)
  opts = check("Channel:queue_purge", opts, with_nowait)
  return counted(rpc(self, "queue.purge", { queue = queue, nowait = opts.no_wait }, opts))
end

local queue_delete_options = options.merge(with_nowait, { if_unused = boolean, if_empty = boolean })

--- Deletes a queue. queue.delete; 406 when `if_unused` or `if_empty` does not hold.
---@param queue string
---@param opts { if_unused: boolean?, if_empty: boolean?, no_wait: boolean?, timeout: number? }?
---@return integer|true|nil count how many messages went with it
---@return moonrabbit.Error?
function Channel:queue_delete(queue, opts)
  argument("Channel:queue_delete", "queue", queue, shortstr)
  opts = check("Channel:queue_delete", opts, queue_delete_options)
  return counted(rpc(self, "queue.delete", {
    queue = queue, if_unused = opts.if_unused, if_empty = opts.if_empty, nowait = opts.no_wait,
  }, opts))
end

-- ---- Flow and transactions --------------------------------------------------------------------------

local qos_options = options.merge(common, { global = boolean })

--- How many unsettled deliveries the broker may have out: for each consumer started from now on, or
--- with `global` for the whole channel. 0: no bound. basic.qos,
--- https://www.rabbitmq.com/docs/consumer-prefetch
---@param prefetch_count integer
---@param opts { global: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:qos(prefetch_count, opts)
  argument("Channel:qos", "prefetch_count", prefetch_count, integer(0, 65535))
  opts = check("Channel:qos", opts, qos_options)
  local ok, err = rpc(self, "basic.qos", { prefetch_count = prefetch_count, global = opts.global }, opts)
  if not ok then return nil, err end
  if opts.global then self._prefetch_global = prefetch_count else self._prefetch = prefetch_count end
  return true
end

local recover_options = options.merge(common, { requeue = boolean })

--- Gives every unsettled delivery of the channel back to its queue. basic.recover; RabbitMQ knows
--- only `requeue = true`, the default.
---@param opts { requeue: boolean?, timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:recover(opts)
  opts = check("Channel:recover", opts, recover_options)
  local requeue = opts.requeue
  if requeue == nil then requeue = true end
  return done(rpc(self, "basic.recover", { requeue = requeue }, opts))
end

--- Makes the channel transactional. tx.select; 406 on a confirm channel.
---@param opts { timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:tx_select(opts)
  opts = check("Channel:tx_select", opts, common)
  local ok, err = rpc(self, "tx.select", {}, opts)
  if not ok then return nil, err end
  self._tx = true
  return true
end

--- tx.commit; 406 without tx_select.
---@param opts { timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:tx_commit(opts)
  return done(rpc(self, "tx.commit", {}, check("Channel:tx_commit", opts, common)))
end

--- tx.rollback: takes back publishes and acks since the last commit; the deliveries stay out, and
--- can be settled again by the channel's ack, nack and reject.
---@param opts { timeout: number? }?
---@return true|nil, moonrabbit.Error?
function Channel:tx_rollback(opts)
  return done(rpc(self, "tx.rollback", {}, check("Channel:tx_rollback", opts, common)))
end

--- channel.flow. RabbitMQ takes only `true`; on `false` it closes the connection (540).
---@param active boolean
---@param opts { timeout: number? }?
---@return boolean|nil active, moonrabbit.Error?
function Channel:flow(active, opts)
  argument("Channel:flow", "active", active, boolean)
  opts = check("Channel:flow", opts, common)
  local result, err = rpc(self, "channel.flow", { active = active }, opts)
  if not result then return nil, err end
  return result.active ~= false
end

-- ---- Publishing -------------------------------------------------------------------------------------

-- What a confirmation that failed failed of; the engine keeps only the outcome.
local failure_of = setmetatable({}, { __mode = "k" })

--- The error of a confirmation that is settled and not acked.
---@package
function Channel:_failure(confirmation)
  local err = failure_of[confirmation]
  if err then return err end
  local outcome = core_outcome(confirmation)
  if outcome == "nacked" then
    err = self._session:error("nacked", "the broker refused the message (basic.nack)")
  elseif outcome == "unroutable" then
    err = self._session:error("unroutable", "no queue takes the message", { code = 312 })
  else
    local reason = self:_closed_error()
    err = self._session:error(reason.kind, "the outcome of the publish is unknown: " .. reason.message,
      { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
  end
  failure_of[confirmation] = err
  return err
end

-- Publishing as a function of (channel, x, y), so that waiting for room knows what to repeat.
local function publish_again(self, opts, body)
  return core_publish(self._core, body, opts)
end

local function route_again(self, route, body)
  return core_publish_route(self._core, route, body)
end

-- The engine refused: waits for what it lacks, within `timeout`, and tries again.
local function publish_slow(self, again, x, y, status, timeout, level)
  local session = self._session
  local now = self._runtime.now
  local deadline
  local confirmation, flush
  repeat
    if status == "closed" then return nil, self:_closed_error() end
    if status ~= "window" and status ~= "overflow" and status ~= "blocked" then
      return nil, session:refusal(status, "publish", level + 1)
    end
    if not deadline then
      timeout = timeout or self.timeout
      argument("publish", "option 'timeout'", timeout, seconds, level + 1)
      deadline = now() + timeout
    end
    session.corked = false
    session:try_flush()
    local left = deadline - now()
    if left <= 0 then
      local err = session:refusal(status, "publish")
      if timeout > 0 then err.message = err.message .. (" (for %g s)"):format(timeout) end
      return nil, err
    end
    -- The window belongs to the channel; room in the buffer and connection.blocked to the session;
    -- a channel.flow arrives like the latter.
    local condition = status == "window" and self._room or session.room
    session:block(condition, left)
    confirmation, flush = again(self, x, y)
    if confirmation then
      if flush then session:try_flush() else session:touch() end
      condition:signal() -- there may be room for the next one too
      return confirmation
    end
    status = flush
  until false
end

local function check_body(body, level)
  if type(body) ~= "string" then
    error("publish: the body must be a string, not a " .. type(body), level + 1)
  end
end

--- Publishes and returns at once; the Confirmation tells later how it ended. On a channel without
--- confirms it returns true. Bytes leave with the next turn of the event loop, or when 64 KiB are
--- waiting: in a plain script that does nothing else, call `wait`, `wait_for_confirms` or `flush`.
--- It waits only where there is no room: the window is full, the buffer is full, or the broker has
--- blocked publishing; `err.kind` is then `overflow` or `blocked` after `timeout`, and nothing was sent.
--- basic.publish, https://www.rabbitmq.com/docs/confirms#publisher-confirms
---@param body string
---@param opts table? exchange, routing_key ("" by default); mandatory, persistent (true on confirm channels, else false); content_type, content_encoding, headers, delivery_mode, priority, correlation_id, reply_to, expiration (ms, a string), message_id, timestamp, type, user_id, app_id; timeout (seconds; 0: never wait)
---@return moonrabbit.Confirmation|true|nil
---@return moonrabbit.Error?
function Channel:publish_async(body, opts)
  local confirmation, flush = core_publish(self._core, body, opts)
  if confirmation then
    local session = self._session
    if flush then
      session:try_flush()
    elseif not session.dirty then
      session:touch()
    end
    return confirmation
  end
  local err
  confirmation, err = publish_slow(self, publish_again, opts, body, flush, opts and opts.timeout, 2)
  return confirmation, err
end

--- Publishes and waits for the broker's confirm: true once a queue has the message (and, where it is
--- durable and the message persistent, has it on disk). On a channel without confirms it returns as
--- soon as the message is on its way.
--- err.kind: `nacked`, `unroutable` (with the broker's code and text), `timeout` (unknown: the
--- message may arrive), `closed` or `channel` (unknown), `overflow`, `blocked` (not sent).
---@param body string
---@param opts table? as for publish_async
---@return true|nil, moonrabbit.Error?
function Channel:publish(body, opts)
  check_body(body, 2)
  local timeout = opts and opts.timeout
  if timeout then argument("Channel:publish", "option 'timeout'", timeout, seconds) end
  local confirmation, flush = core_publish(self._core, body, opts)
  if confirmation then
    if confirmation == true then
      if flush then self._session:try_flush() else self._session:touch() end
      return true
    end
    return self:_wait(confirmation, timeout, true)
  end
  local now = self._runtime.now
  timeout = timeout or self.timeout
  local deadline = now() + timeout
  local err
  confirmation, err = publish_slow(self, publish_again, opts, body, flush, timeout, 2)
  if not confirmation then return nil, err end
  if confirmation == true then return true end
  return self:_wait(confirmation, math.max(0, deadline - now()), true)
end

--- Publishes through a prepared route (core.route); used by Publisher.
---@package
function Channel:_publish_route(route, body, timeout)
  local confirmation, flush = core_publish_route(self._core, route, body)
  if confirmation then
    local session = self._session
    if flush then
      session:try_flush()
    elseif not session.dirty then
      session:touch()
    end
    return confirmation
  end
  return publish_slow(self, route_again, route, body, flush, timeout, 3)
end

--- Sends a message on; used by Message:forward.
---@package
function Channel:_forward(message, exchange, routing_key, opts, timeout)
  local mandatory = opts.mandatory
  if mandatory == nil then mandatory = self.confirm end
  local function again()
    return core_forward(self._core, message, exchange, routing_key, mandatory, opts.set, opts.remove,
      opts.remove_properties)
  end
  local confirmation, flush = again()
  if confirmation then
    if flush then self._session:try_flush() else self._session:touch() end
    return confirmation
  end
  return publish_slow(self, again, nil, nil, flush, timeout, 3)
end

-- ---- Waiting for confirms ---------------------------------------------------------------------------

-- A waiter is { condition, confirmation, seq, index, own }; they are used again.
local function add_waiter(self, confirmation, own)
  local _, seq = core_outcome(confirmation)
  local waiter = self._waiting[seq]
  if waiter then
    waiter.count = waiter.count + 1
    return waiter
  end
  local spare = self._spare
  waiter = spare[#spare]
  if waiter then
    spare[#spare] = nil
  else
    waiter = { condition = self._runtime.condition() }
  end
  if self._waiters == 0 then self._head, self._tail = 1, 0 end
  local index = self._tail + 1
  self._tail = index
  self._order[index] = waiter
  waiter.confirmation, waiter.seq, waiter.index, waiter.own, waiter.count = confirmation, seq, index, own, 1
  self._waiting[seq] = waiter
  self._waiters = self._waiters + 1
  return waiter
end

-- Takes a waiter off the lists; it is still referred to by those who wait.
local function remove_waiter(self, waiter)
  if self._waiting[waiter.seq] == waiter then
    self._waiting[waiter.seq] = nil
    self._order[waiter.index] = false
    self._waiters = self._waiters - 1
  end
end

local function settle_waiter(self, waiter)
  remove_waiter(self, waiter)
  waiter.condition:broadcast()
end

-- Wakes those whose publish is settled. Confirms mostly come in order, so mostly the first few are it;
-- no batch of confirms looks at all of many thousands.
local function wake_settled(self, limit)
  local order, tail = self._order, self._tail
  local i = self._head
  local pending = 0
  local leading = true
  while i <= tail do
    local waiter = order[i]
    if waiter and core_acked(waiter.confirmation) ~= false then
      settle_waiter(self, waiter)
      waiter = false
    end
    if not waiter then
      if leading then
        order[i] = nil
        self._head = i + 1
      end
    else
      leading = false
      pending = pending + 1
      if pending >= limit then return false end
    end
    i = i + 1
  end
  return true
end

---@package
function Channel:_confirmed()
  if self._waiters > 0 and not wake_settled(self, SCAN) and not self._sweeping then
    self._sweeping = true
    self._runtime.spawn(function()
      self._runtime.sleep(0.005)
      self._sweeping = false
      wake_settled(self, huge)
    end)
  end
  self._room:signal()
  if self._core:unconfirmed() == 0 then self._settled:broadcast() end
end

---@package
function Channel:_returned(message, seq)
  if seq then
    self._returns = self._returns or {}
    self._returns[seq] = { message.reply_code, message.reply_text }
  end
  self:_emit("return", message)
end

---@package
function Channel:_failed(seq, outcome, confirmation)
  local err
  if outcome == "unroutable" then
    local returned = self._returns and self._returns[seq]
    if returned then self._returns[seq] = nil end
    err = self._session:error("unroutable", ("no queue takes the message: %s (%s)"):format(
      returned and returned[2] or "NO_ROUTE", returned and returned[1] or 312),
      { code = returned and returned[1] or 312, class = 60, method = 40 })
  else
    err = self._session:error("nacked", "the broker refused the message (basic.nack)", { class = 60, method = 120 })
  end
  if confirmation then failure_of[confirmation] = err end
  local waiter = self._waiting[seq]
  if not (waiter and waiter.own) then
    local failures = self._failures
    if #failures < MAX_FAILURES then
      failures[#failures + 1] = { seq = seq, outcome = outcome, err = err }
    else
      self._failures_lost = self._failures_lost + 1
    end
  end
  if waiter then settle_waiter(self, waiter) end
  local rpc_call = self._rpc_failed
  if rpc_call then rpc_call(seq, err) end
  self._room:signal()
  if self._core:unconfirmed() == 0 then self._settled:broadcast() end
end

--- Waits for one confirmation. `own`: the failure is the caller's alone to hear of.
---@package
function Channel:_wait(confirmation, timeout, own)
  local acked = core_acked(confirmation)
  if acked then return true end
  if acked == nil then return nil, self:_failure(confirmation) end
  timeout = timeout or self.timeout
  if timeout > 0 then
    local now = self._runtime.now
    local deadline = now() + timeout
    local waiter = add_waiter(self, confirmation, own)
    local session = self._session
    session:touch()
    local condition = waiter.condition
    repeat
      local left = deadline - now()
      if left <= 0 then break end
      session:block(condition, left)
      acked = core_acked(confirmation)
    until acked ~= false
    waiter.count = waiter.count - 1
    if waiter.count == 0 then
      remove_waiter(self, waiter)
      waiter.confirmation = nil
      local spare = self._spare
      if #spare < 64 then spare[#spare + 1] = waiter end
    end
  end
  if acked then return true end
  if acked == nil then return nil, self:_failure(confirmation) end
  return nil, self._session:error("timeout", ("the broker has not confirmed the message within %g s"):format(timeout)
    .. (self._session.blocked and " (it has blocked publishing)" or ""))
end

--- Waits until every publish of this channel is settled: true when all since the last call were
--- acked. Else err.failed is a list of { seq, outcome, err }, without those whose failure `publish`
--- has returned already; on a `timeout`, err.pending tells how many are not settled yet.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Channel:wait_for_confirms(timeout)
  if timeout ~= nil then argument("Channel:wait_for_confirms", "timeout", timeout, seconds) end
  if not self.confirm then error("Channel:wait_for_confirms: the channel was opened without confirm = true", 2) end
  timeout = timeout or self.timeout
  local session, now = self._session, self._runtime.now
  local deadline = now() + timeout
  session:touch()
  local pending = self._core:unconfirmed()
  while pending > 0 do
    local left = deadline - now()
    if left <= 0 then break end
    self._pending = pending
    session:block(self._settled, left)
    pending = self._core:unconfirmed()
  end
  self._pending = nil
  local failed, lost = self._failures, self._failures_lost
  local err
  if self._closed and self._lost then
    local reason = self._closed
    err = session:error(reason.kind, "publishes may not have been settled: " .. reason.message,
      { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
    if type(self._lost) == "number" then err.pending = self._lost end
    self._lost = nil
  elseif pending > 0 then
    err = session:error("timeout", ("%d publishes were not confirmed within %g s"):format(pending, timeout))
    err.pending = pending
  elseif #failed > 0 then
    local first = failed[1].err
    err = session:error(first.kind, ("%d publishes failed; the first: %s"):format(#failed + lost, first.message),
      { code = first.code, class = first.class, method = first.method, temporary = first.temporary })
  else
    return true
  end
  self._failures, self._failures_lost = {}, 0
  err.failed = failed
  return nil, err
end

--- How many publishes are not settled yet.
---@return integer
function Channel:unconfirmed()
  return self._core:unconfirmed()
end

-- ---- Consuming --------------------------------------------------------------------------------------

local get_options = options.merge(common, { no_ack = boolean })

--- Takes one message, if there is one: a message, or false when the queue is empty. basic.get;
--- to take many, consume is far better.
---@param queue string
---@param opts { no_ack: boolean?, timeout: number? }?
---@return moonrabbit.Message|false|nil, moonrabbit.Error?
function Channel:get(queue, opts)
  argument("Channel:get", "queue", queue, shortstr)
  opts = check("Channel:get", opts, get_options)
  if self._closed then return nil, self._closed end
  local session = self._session
  local ok, status = self._core:get(queue, opts.no_ack or false)
  if not ok then
    if status == "closed" then return nil, self:_closed_error() end
    return nil, session:refusal(status, "Channel:get")
  end
  local no_ack = opts.no_ack
  local function late(message)
    -- Nobody takes it any more: back to the queue with it.
    if core.is_message(message) and not no_ack then
      core.settle(message, "nack", true)
      session:touch()
    end
  end
  local result, extra = session:await(session:expect(self._calls, "basic.get", late), opts.timeout or self.timeout)
  if result == nil then return nil, extra end
  if extra == "basic.get-ok" then return result end
  return false
end

--- Starts a consumer. With a handler, it runs in tasks, at most `concurrency` at once; without one,
--- take messages by `consumer:messages()` or `consumer:receive()`. See moonrabbit.consumer.
--- basic.consume, https://www.rabbitmq.com/docs/consumers
---@param queue string
---@param opts moonrabbit.ConsumeOptions?
---@param handler fun(message: moonrabbit.Message)?
---@return moonrabbit.Consumer|nil, moonrabbit.Error?
function Channel:consume(queue, opts, handler)
  local consumer, err = require("moonrabbit.consumer").start(self, queue, opts, handler, 2)
  return consumer, err
end

--- Cancels a consumer, as consumer:cancel does.
---@param consumer moonrabbit.Consumer|string a Consumer or its tag
---@param opts table?
---@return true|nil, moonrabbit.Error?
function Channel:cancel(consumer, opts)
  if type(consumer) == "string" then
    local found = self._consumers[consumer]
    if not found then
      return nil, self._closed or self._session:error("cancelled", "this channel has no such consumer",
        { temporary = false })
    end
    consumer = found
  end
  return consumer:cancel(opts)
end

-- ---- Settling ---------------------------------------------------------------------------------------

local multiple_options = { multiple = boolean }
local nack_options = { multiple = boolean, requeue = boolean }
local reject_options = { requeue = boolean }

local function settled(self, ok, flush, what, tag, level)
  if ok then
    if flush then self._session:try_flush() else self._session:touch() end
    return true
  end
  if flush == "settled" then
    error(("%s: delivery %s was settled before"):format(what, tostring(tag)), level + 1)
  elseif flush == "unknown_tag" then
    error(("%s: no delivery %s is outstanding on this channel"):format(what, tostring(tag)), level + 1)
  elseif flush == "closed" then
    return nil, self:_closed_error()
  end
  return nil, self._session:refusal(flush, what, level + 1)
end

local function tag_of(what, value, level)
  if core.is_message(value) then return value.delivery_tag end
  argument(what, "delivery tag", value, integer(0, 9007199254740991), level + 1)
  return value
end

--- Acks a delivery (a message or its tag). With `multiple` also every earlier one that is outstanding;
--- tag 0: all. It leaves gathered with others: with the next write, or within ack_delay.
--- Settling twice throws; for a message of a closed channel the answer is nil, err of kind `closed`
--- (the broker has requeued it). basic.ack
---@param tag integer|moonrabbit.Message
---@param opts { multiple: boolean? }?
---@return true|nil, moonrabbit.Error?
function Channel:ack(tag, opts)
  tag = tag_of("Channel:ack", tag, 2)
  opts = check("Channel:ack", opts, multiple_options)
  if self._closed then return nil, self:_closed_error() end
  if opts.multiple then
    local ok, flush = self._core:settle_upto(tag, "ack", false)
    local result, err = settled(self, ok, flush, "Channel:ack", tag, 2)
    return result, err
  end
  local ok, flush = self._core:settle(tag, "ack", false)
  local result, err = settled(self, ok, flush, "Channel:ack", tag, 2)
  return result, err
end

--- Refuses a delivery; it goes back to its queue unless `requeue = false` (then it is dead-lettered
--- or dropped). basic.nack, https://www.rabbitmq.com/docs/nack
---@param tag integer|moonrabbit.Message
---@param opts { multiple: boolean?, requeue: boolean? }? requeue: true by default
---@return true|nil, moonrabbit.Error?
function Channel:nack(tag, opts)
  tag = tag_of("Channel:nack", tag, 2)
  opts = check("Channel:nack", opts, nack_options)
  if self._closed then return nil, self:_closed_error() end
  local requeue = opts.requeue ~= false
  local ok, flush
  if opts.multiple then
    ok, flush = self._core:settle_upto(tag, "nack", requeue)
  else
    ok, flush = self._core:settle(tag, "nack", requeue)
  end
  local result, err = settled(self, ok, flush, "Channel:nack", tag, 2)
  return result, err
end

--- Rejects a delivery; it is dead-lettered or dropped unless `requeue = true`. basic.reject
---@param tag integer|moonrabbit.Message
---@param opts { requeue: boolean? }? requeue: false by default
---@return true|nil, moonrabbit.Error?
function Channel:reject(tag, opts)
  tag = tag_of("Channel:reject", tag, 2)
  opts = check("Channel:reject", opts, reject_options)
  if self._closed then return nil, self:_closed_error() end
  local ok, flush = self._core:settle(tag, "reject", opts.requeue or false)
  local result, err = settled(self, ok, flush, "Channel:reject", tag, 2)
  return result, err
end

--- How many deliveries are not settled yet.
---@return integer
function Channel:unsettled()
  return self._core:unsettled()
end

-- ---- Events -----------------------------------------------------------------------------------------

local events = { close = true, ["return"] = true, flow = true, cancel = true }

--- Calls `fn` on an event, in a task of its own: "close" (err), "return" (message: an unroutable
--- publish came back; message.reply_code, message.reply_text), "flow" (active),
--- "cancel" (consumer: the broker cancelled it). Returns a function that takes it off again.
---@param event "close"|"return"|"flow"|"cancel"
---@param fn function
---@return function off
function Channel:on(event, fn)
  if not events[event] then
    error("Channel:on: there is no event '" .. tostring(event) .. "' (close, return, flow, cancel)", 2)
  end
  argument("Channel:on", "fn", fn, options.callback)
  self._listeners = self._listeners or {}
  local list = self._listeners[event] or {}
  self._listeners[event] = list
  list[#list + 1] = fn
  return function()
    for i = #list, 1, -1 do
      if list[i] == fn then table.remove(list, i) end
    end
  end
end

function Channel:_emit(event, ...)
  local list = self._listeners and self._listeners[event]
  if list and #list > 0 then self.connection:_dispatch(list, ...) end
end

---@package
function Channel:_flow(active)
  if active then self._room:signal() end
  self:_emit("flow", active)
end

---@package
function Channel:_consumer_cancelled(consumer_tag, queue)
  local consumer = queue and self._receivers[queue] or self._consumers[consumer_tag]
  if consumer then
    consumer:_finish(self._session:error("cancelled",
      "the broker cancelled the consumer: its queue was deleted, or its node is gone", { temporary = true }), true)
    if self._consumers[consumer_tag] == consumer then self:_emit("cancel", consumer) end
    self._consumers[consumer_tag] = nil
  end
end

-- ---- The end ----------------------------------------------------------------------------------------

--- The channel is over. `quiet`: by this side, so it is no event.
---@package
function Channel:_ended(err, quiet)
  if self._closed then return end
  self._closed = err
  self._session.channels[self] = nil
  if not quiet then self._calls:fail(err) end
  -- How many were unsettled when it ended, where that is known.
  if not quiet then self._lost = self.confirm and (self._pending or true) end
  for _, waiter in pairs(self._waiting) do waiter.condition:broadcast() end
  self._waiting, self._order, self._head, self._tail, self._waiters = {}, {}, 1, 0, 0
  for _, consumer in pairs(self._consumers) do consumer:_finish(err, false) end
  self._consumers = {}
  for _, receiver in pairs(self._receivers) do
    if receiver._channel_ended then receiver:_channel_ended(err) end
  end
  self._receivers = {}
  self._room:broadcast()
  self._settled:broadcast()
  if not quiet then self:_emit("close", err) end
end

---@return boolean
function Channel:is_open()
  return not self._closed
end

--- Closes the channel: gathered acks leave first, unsettled deliveries go back to their queues,
--- the outcome of unconfirmed publishes stays unknown (wait_for_confirms before). channel.close
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Channel:close(timeout)
  if timeout ~= nil then argument("Channel:close", "timeout", timeout, seconds) end
  if self._closed then return true end
  local session = self._session
  local unconfirmed = self._core:unconfirmed()
  local ok = self._core:close(200, "Goodbye")
  if unconfirmed > 0 then self._lost = unconfirmed end
  if not ok then
    self:_ended(session.reason or session:error("closed", "the channel is closed"), true)
    return true
  end
  local call = session:expect(self._calls, "channel.close")
  self:_ended(session:error("closed", "the channel was closed by this side", { temporary = false }), true)
  local result, err = session:await(call, timeout or self.timeout)
  self._calls:fail(self._closed)
  if not result and err.kind == "timeout" then return nil, err end
  return true
end

function Channel:__tostring()
  return ("%s %d (%s)"):format(Channel.__name, self._core and self._core:id() or 0,
    self._closed and "closed" or "open")
end

--- Lua 5.4: `local ch <close> = conn:channel()` closes without waiting for the answer.
function Channel:__close()
  self:_abandon()
  self._session:try_flush()
end

return Channel
