--- The methods of a channel that publish and wait for confirms.
-- @module moonrabbit.channel

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local trace = require "moonrabbit.trace"

local core_acked, core_outcome = core.acked, core.outcome
local huge = math.huge
local argument, seconds = options.argument, options.seconds

---@class moonrabbit.PublishOptions
---@field exchange string?          "" by default: the routing key is the name of a queue
---@field routing_key string?       "" by default
---@field mandatory boolean?        a message that no queue takes comes back, as a failure of kind `unroutable`; true by default on a confirm channel, else false
---@field persistent boolean?       a durable queue keeps the message on disk; true by default on a confirm channel, else false
---@field headers table?            names to values: strings, numbers, booleans, lists, tables, `moonrabbit.null`, `moonrabbit.types`
---@field message_id string?        for consumers, to tell a message that comes twice
---@field correlation_id string?    of a reply: which request it answers
---@field reply_to string?          the queue that a reply is to go to
---@field content_type string?      a MIME type
---@field content_encoding string?  such as "gzip"
---@field expiration (string|number)?  milliseconds after which a queue drops the message
---@field priority integer?         0 to 255, in a queue with `x-max-priority`
---@field timestamp (integer|userdata)?  seconds since 1970, or a `types.timestamp`
---@field type string?              what kind of message it is, for the application
---@field user_id string?           the broker refuses any but the connection's user
---@field app_id string?            the application that publishes
---@field cluster_id string?        deprecated by AMQP
---@field delivery_mode integer?    1: transient, 2: persistent; over `persistent`
---@field timeout number?           seconds; the channel's by default

---@class moonrabbit.Channel
local Channel = {}

-- How many failed publishes are kept for wait_for_confirms.
local MAX_FAILURES = 10000
-- Waiters beyond the first unsettled one that are looked at for each batch of confirms.
local SCAN = 256

-- The engine's methods, taken from the first channel.
local core_publish, core_publish_route, core_forward

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
    local reason = self._lost_by or self:_closed_error()
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
  local now = self._runtime.now
  local deadline
  local confirmation, flush
  repeat
    local session = self._session -- another one, once the connection was lost and is back
    if status == "closed" then return nil, self:_closed_error() end
    if status == "blocked" and session.held then return nil, session:error("blocked", session.held) end
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
    session = self._session
    if confirmation then
        if flush then session:try_flush() else session:touch() end
      condition:signal() -- there may be room for the next one too
      return confirmation
    end
    status = flush
  until false
end

local function check_publish(body, opts, level)
  if type(body) ~= "string" then
    error("publish: the body must be a string, not a " .. type(body), level + 1)
  end
  if opts ~= nil and type(opts) ~= "table" then
    error("publish: opts must be a table, not a " .. type(opts), level + 1)
  end
end

--- Publishes and returns at once; the Confirmation tells later how it ended. On a channel without
--- confirms it returns true. Bytes leave with the next turn of the event loop, or when 256 KiB are
--- waiting: in a plain script that does nothing else, call `wait`, `wait_for_confirms` or `flush`.
--- It waits only where there is no room: the window is full, the buffer is full, or the broker has
--- blocked publishing; `err.kind` is then `overflow` or `blocked` after `timeout` (0: it never waits), and
--- nothing was sent.
--- basic.publish, https://www.rabbitmq.com/docs/confirms#publisher-confirms
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return moonrabbit.Confirmation|true|nil confirmation, moonrabbit.Error?
function Channel:publish_async(body, opts)
  if trace.on then opts = trace.add(self._runtime, opts) end
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
---@param body string any bytes
---@param opts moonrabbit.PublishOptions?
---@return true|nil, moonrabbit.Error?
function Channel:publish(body, opts)
  check_publish(body, opts, 2)
  if trace.on then opts = trace.add(self._runtime, opts) end
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

--- Publishes through a prepared route and waits for the confirm, all within the channel's timeout.
---@package
function Channel:_send_route(route, body)
  local now = self._runtime.now
  local deadline = now() + self.timeout
  local confirmation, err = self:_publish_route(route, body)
  if not confirmation then return nil, err end
  return self:_wait(confirmation, math.max(0, deadline - now()), true)
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

--- A condition for whoever cannot say when they wait no longer: it is broadcast when the confirmation is settled. And
--- the runtime that it is of.
---@package
function Channel:_condition_of(confirmation)
  local waiter = add_waiter(self, confirmation, false)
  if waiter.stays then waiter.count = waiter.count - 1 end
  waiter.stays = true
  return waiter.condition, self._runtime
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

-- Whoever waits for the last confirm goes on.
local function all_settled(self)
  if self._core:unconfirmed() == 0 then self._settled:broadcast() end
end

-- `_notice`, where somebody has set it, is called when publishes were settled, and must not yield: what it does
-- not look at itself is kept for nobody.
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
  all_settled(self)
  if self._notice then self._notice() end
  if self._publisher then self._publisher:_confirmed() end
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
  local returned = self._returns and self._returns[seq]
  if returned then self._returns[seq] = nil end
  if outcome == "unroutable" then
    err = self._session:error("unroutable", ("no queue takes the message: %s (%s)"):format(
      returned and returned[2] or "NO_ROUTE", returned and returned[1] or 312),
      { code = returned and returned[1] or 312, class = 60, method = 40 })
  else
    err = self._session:error("nacked", "the broker refused the message (basic.nack)", { class = 60, method = 120 })
  end
  if self._publisher and confirmation and self._publisher:_failed(outcome, confirmation, err) then return end
  if confirmation then failure_of[confirmation] = err end
  local waiter = self._waiting[seq]
  local own = waiter and waiter.own or confirmation and confirmation == self._own
  if not own and not self._notice then
    local failures = self._failures
    if #failures < MAX_FAILURES then
      failures[#failures + 1] = { seq = seq, outcome = outcome, err = err }
    else
      failures.more = (failures.more or 0) + 1
    end
  end
  if waiter then settle_waiter(self, waiter) end
  local rpc_call = self._rpc_failed
  if rpc_call then rpc_call(seq, err) end
  self._room:signal()
  all_settled(self)
  if self._notice then self._notice() end
end

-- A script's main chunk reads what comes by itself as long as there is nobody else to run. Answers as
-- core.acked does.
local function wait_alone(self, confirmation, deadline, own)
  local session = self._session
  local acked = false
  session:try_flush() -- no other task could add to this write
  self._own = own and confirmation
  while acked == false and not self._closed and session:read_alone(deadline) do acked = core_acked(confirmation) end
  self._own = nil
  return acked
end

-- In line with others, while the loop runs.
local function wait_in_loop(self, confirmation, deadline, own, flushed)
  local session, now = self._session, self._runtime.now
  local acked = false
  local waiter = add_waiter(self, confirmation, own)
  if not flushed then session:touch() end
  repeat
    local left = deadline - now()
    if left <= 0 then break end
    session:block(waiter.condition, left)
    acked = core_acked(confirmation)
  until acked ~= false or self._closed
  waiter.count = waiter.count - 1
  if waiter.count == 0 then
    remove_waiter(self, waiter)
    waiter.confirmation = nil
    local spare = self._spare
    if #spare < 64 then spare[#spare + 1] = waiter end
  end
  return acked
end

--- Waits for one confirmation. `own`: the failure is the caller's alone to hear of.
---@package
function Channel:_wait(confirmation, timeout, own)
  local acked = core_acked(confirmation)
  if acked then return true end
  if acked == nil or self._closed then return nil, self:_failure(confirmation) end
  timeout = timeout or self.timeout
  if timeout > 0 then
    local runtime = self._runtime
    local deadline = runtime.now() + timeout
    local script = runtime.current and not runtime.current()
    if script then acked = wait_alone(self, confirmation, deadline, own) end
    if acked == false and not self._closed then acked = wait_in_loop(self, confirmation, deadline, own, script) end
  end
  if acked then return true end
  if acked == nil or self._closed then return nil, self:_failure(confirmation) end
  return nil, self._session:error("timeout", ("the broker has not confirmed the message within %g s"):format(timeout)
    .. (self._session.blocked and " (it has blocked publishing)" or ""))
end

--- Waits until every publish of this channel is settled: true when all since the last call were
--- acked. Else err.failed is a list of { seq, outcome, err }, without those whose failure `publish`
--- has returned already; on a `timeout`, err.pending tells how many are not settled yet. err.kind is
--- otherwise the first failure's, or what ended the channel (`closed`, `channel`); on a channel that has come
--- back since, what was lost is told once, err.pending says how many. On a channel without confirms it throws.
---@param timeout number? seconds; the channel's by default
---@return true|nil, moonrabbit.Error?
function Channel:wait_for_confirms(timeout)
  if timeout ~= nil then argument("Channel:wait_for_confirms", "timeout", timeout, seconds) end
  if not self.confirm then error("Channel:wait_for_confirms: the channel was opened without confirm = true", 2) end
  timeout = timeout or self.timeout
  local session, now = self._session, self._runtime.now
  local deadline = now() + timeout
  session:touch()
  local core_channel = self._core
  local pending = core_channel:unconfirmed()
  local failed = self._failures
  while pending > 0 and not self._closed and self._core == core_channel do
    local left = deadline - now()
    if left <= 0 then break end
    session:block(self._settled, left)
    pending = core_channel:unconfirmed()
  end
  -- Another task that waited may have taken them, and left new ones.
  if #failed == 0 then failed = self._failures end
  local err
  -- What this core channel lost is told to all who waited on it, what earlier ones did to the next who asks.
  local lost = math.max(core_channel:lost(), self._lost or 0)
  if lost > 0 then
    local reason = self._lost_by or self._closed
    err = session:error(reason.kind, "publishes may not have been settled: " .. reason.message,
      { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
    err.pending = lost
    if not self._over then self._lost = nil end
  elseif pending > 0 then
    err = session:error("timeout", ("%d publishes were not confirmed within %g s"):format(pending, timeout))
    err.pending = pending
  elseif #failed > 0 then
    local first = failed[1].err
    err = session:error(first.kind, ("%d publishes failed; the first: %s"):format(#failed + (failed.more or 0),
      first.message),
      { code = first.code, class = first.class, method = first.method, temporary = first.temporary })
  else
    return true
  end
  if self._failures == failed then self._failures = {} end
  err.failed = failed
  return nil, err
end

--- How many publishes are not settled yet; 0 on a channel without confirms.
---@return integer
function Channel:unconfirmed()
  return self._core:unconfirmed()
end

local publishing = {}

--- Adds the methods to the class.
---@package
function publishing.extend(class)
  for name, method in pairs(Channel) do class[name] = method end
end

--- Takes the engine's methods from a channel of it.
---@package
function publishing.bind(core_channel)
  core_publish = core_publish or core_channel.publish
  core_publish_route = core_publish_route or core_channel.publish_route
  core_forward = core_forward or core_channel.forward
end

return publishing
