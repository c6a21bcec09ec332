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
local Calls = require "moonrabbit.session.calls"
local parts = require "moonrabbit.parts"
local Waiters = require "moonrabbit.channel.waiters"
local confirms = require "moonrabbit.channel.confirms"
local publishing = require "moonrabbit.channel.publishing"
local survival = require "moonrabbit.channel.survival"
local topology = require "moonrabbit.channel.topology"

local check, argument = options.check, options.argument
local shortstr, boolean, seconds, integer = options.shortstr, options.boolean, options.seconds, options.integer

---@class moonrabbit.Channel
---@field connection moonrabbit.Connection
---@field timeout number         seconds that its calls wait unless they say otherwise
---@field confirm boolean        whether publishes are confirmed
---@field package _core moonrabbit.core.Channel
---@field package _session moonrabbit.Session
local Channel = {}
Channel.__index = Channel
Channel.__name = "moonrabbit.Channel"

parts(Channel, topology, publishing, confirms, survival)

-- ---- Opening -------------------------------------------------------------------------------------

local channel_options = {
  confirm = boolean,
  prefetch = integer(0, 65535),
  window = integer(0, 4294967295),
  timeout = seconds,
}

-- Options of every call.
local common = { timeout = seconds }

--- Opens a channel; used by Connection:channel, which lets it survive.
---@package
function Channel.open(connection, session, opts, level)
  opts = check("Connection:channel", opts, channel_options, (level or 2) + 1)
  local self = setmetatable({
    connection = connection,
    timeout = opts.timeout or connection.call_timeout,
    confirm = opts.confirm or false,
    _session = session,
    _runtime = session.runtime,
    _calls = Calls.new(),
    _receivers = {},             -- DeliveryQueue -> what takes its deliveries
    _consumers = {},             -- consumer tag -> Consumer
    _room = session.runtime.condition(),    -- publishers that wait for the window
    _settled = session.runtime.condition(), -- wait_for_confirms
    _waiters = Waiters.new(session.runtime), -- for the outcome of one publish
    _failures = {},              -- of publishes whose caller does not wait; `more`: beyond those kept
    _prefetch = opts.prefetch,   -- what was chosen for its consumers, nil: nothing
    _told = opts.prefetch,       -- what basic.qos was last told, nil: nothing
    _window = opts.window or 65536,
  }, Channel)
  if session.state ~= "open" then return nil, connection:_closed_error() end
  local deadline = session.runtime.now() + self.timeout
  -- Opened after all, and nobody waits for it any more (its task was cancelled).
  local calls, refusal = self:_attach(session, function() self:_abandon() end)
  if not calls then return nil, refusal end
  local ok, err = session:await_all(calls, deadline)
  if not ok then
    if not self._closed then self:_abandon() end
    return nil, err
  end
  if self._closed then return nil, self._closed end -- it ended right behind the answers
  return self
end

-- Closes without waiting: what is to be said to the broker is said, whatever it answers is dropped.
function Channel:_abandon()
  local err = self._session:error("closed", "the channel was closed by this side", { temporary = false })
  if self._closed then
    self._calls:fail(err)
    return self:_ended(err, true)
  end
  local unconfirmed = self._core:unconfirmed()
  if unconfirmed > 0 then self._lost = (self._lost or 0) + unconfirmed end
  local said = self._core:close(200, "Goodbye")
  self._calls:fail(err)
  if said then self._session:expect(self._calls, "channel.close").abandoned = true end
  self:_ended(err, true)
end

-- ---- Calls ------------------------------------------------------------------------------------------

function Channel:_closed_error()
  return self._closed or self._session.reason or self._session:error("closed", "the channel is closed")
end

-- What settling a delivery of a channel that has ended answers: `closed`, whatever ended it.
---@package
function Channel:_gone()
  if not self._closed and self._session.state ~= "closed" then
    return self._session:error("closed", "the delivery has gone back to its queue already", { temporary = false })
  end
  local reason = self:_closed_error()
  if reason.kind == "closed" then return reason end
  return self._session:error("closed", "the channel has ended, and its deliveries have gone back: " .. reason.message,
    { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
end

-- Sends a method and waits for its reply: fields, or nil, err.
---@package
function Channel:_rpc(method, fields, opts, late)
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

-- ---- Consuming --------------------------------------------------------------------------------------

---@class moonrabbit.GetOptions
---@field no_ack boolean?  the broker forgets the message as it sends it; false by default
---@field timeout number?  seconds

local get_options = options.merge(common, { no_ack = boolean })

--- Takes one message, if there is one. basic.get; to take many, Channel:consume is far better.
---@param queue string
---@param opts moonrabbit.GetOptions?
---@return moonrabbit.Message|false|nil message, moonrabbit.Error? false: the queue is empty
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
--- basic.consume, https://www.rabbitmq.com/docs/consumers. err.code: 404 no such queue, 403 it is
--- consumed exclusively, 405 another connection's exclusive queue; all of them end the channel.
---@param queue string
---@param opts moonrabbit.ConsumeOptions? may be left out before a handler
---@param handler fun(message: moonrabbit.Message)? settles its message itself
---@return moonrabbit.Consumer|nil, moonrabbit.Error?
function Channel:consume(queue, opts, handler)
  local consumer, err = require("moonrabbit.consumer").start(self, queue, opts, handler, 2)
  return consumer, err
end

--- Cancels a consumer, as Consumer:cancel does. err.kind `cancelled`: the channel has none with that tag.
---@param consumer moonrabbit.Consumer|string a Consumer or its tag
---@param opts moonrabbit.CancelOptions? as for Consumer:cancel
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

---@class moonrabbit.AckOptions
---@field multiple boolean?  every earlier one that is outstanding too; false by default

---@class moonrabbit.NackOptions
---@field multiple boolean?  every earlier one that is outstanding too; false by default
---@field requeue boolean?   true by default

---@class moonrabbit.RejectOptions
---@field requeue boolean?   false by default

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
    return nil, self:_gone()
  end
  return nil, self._session:refusal(flush, what, level + 1)
end

-- The tag of a delivery of this channel; nil, err for a message of a channel that has ended, whose tag may
-- be another delivery's here.
local function tag_of(self, what, value, level)
  if core.is_message(value) then
    local owner = core.owner(value)
    if owner ~= self then
      if owner._closed then return nil, owner:_gone() end
      error(("%s: the message is of another channel, %s: settle it there, or by its own methods"):format(what,
        tostring(owner)), level + 1)
    end
    return value.delivery_tag
  end
  argument(what, "delivery tag", value, integer(0, 9007199254740991), level + 1)
  return value
end

--- Acks a delivery (a message or its tag). With `multiple` also every earlier one that is outstanding;
--- tag 0: all. It leaves gathered with others: with the next write, or within ack_delay.
--- Settling twice throws; for a message of a closed channel the answer is nil, err of kind `closed`
--- (the broker has requeued it). basic.ack
---@param tag integer|moonrabbit.Message
---@param opts moonrabbit.AckOptions?
---@return true|nil, moonrabbit.Error?
function Channel:ack(tag, opts)
  opts = check("Channel:ack", opts, multiple_options)
  local gone
  tag, gone = tag_of(self, "Channel:ack", tag, 2)
  if not tag then return nil, gone end
  if self._closed then return nil, self:_gone() end
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
---@param opts moonrabbit.NackOptions?
---@return true|nil, moonrabbit.Error?
function Channel:nack(tag, opts)
  opts = check("Channel:nack", opts, nack_options)
  local gone
  tag, gone = tag_of(self, "Channel:nack", tag, 2)
  if not tag then return nil, gone end
  if self._closed then return nil, self:_gone() end
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
---@param opts moonrabbit.RejectOptions?
---@return true|nil, moonrabbit.Error?
function Channel:reject(tag, opts)
  opts = check("Channel:reject", opts, reject_options)
  local gone
  tag, gone = tag_of(self, "Channel:reject", tag, 2)
  if not tag then return nil, gone end
  if self._closed then return nil, self:_gone() end
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

local events = { close = true, lost = true, recovered = true, ["return"] = true, flow = true, cancel = true }

--- Calls `fn` on an event. The calls come one after the other, in a task of their own:
---
--- * "close" (err): the broker closed the channel, or the connection ended, and it does not come back
--- * "lost" (err): the same, and it is opened again; "recovered" (): it can be used again
--- * "return" (message): an unroutable publish came back; message.reply_code, message.reply_text
--- * "flow" (active): the broker stopped publishing on this channel, or allowed it again
--- * "cancel" (consumer): the broker cancelled it, for its queue was deleted
---@param event "close"|"lost"|"recovered"|"return"|"flow"|"cancel"
---@param fn function   it may wait; what it throws is logged
---@return function off takes `fn` off again
function Channel:on(event, fn)
  if not events[event] then
    error("Channel:on: there is no event '" .. tostring(event) .. "' (close, lost, recovered, return, flow, cancel)", 2)
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
  if not consumer then return end
  local err = self._session:error("cancelled",
    "the broker cancelled the consumer: its queue was deleted, or its node is gone", { temporary = true })
  if queue then self._receivers[queue] = nil end
  local known = self._consumers[consumer_tag] == consumer
  if known and self._lasting and consumer:_may_come_back() then
    consumer:_suspend(err, true)
    self.connection._repairs:add("consumer", consumer, err)
  else
    if known then self._consumers[consumer_tag] = nil end
    consumer:_finish(err, true)
    consumer:_let_go()
  end
  if known then self:_emit("cancel", consumer) end
end

-- ---- Closing ----------------------------------------------------------------------------------------

--- Whether it can be used now.
---@return boolean
function Channel:is_open()
  return not self._closed
end

--- Closes the channel: gathered acks leave first, unsettled deliveries go back to their queues,
--- the outcome of unconfirmed publishes stays unknown (Channel:wait_for_confirms before). Closing again
--- does nothing. channel.close
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Channel:close(timeout)
  if timeout ~= nil then argument("Channel:close", "timeout", timeout, seconds) end
  if self._over then return true end
  local session = self._session
  local err = session:error("closed", "the channel was closed by this side", { temporary = false })
  local unconfirmed = self._core:unconfirmed()
  local ok = not self._closed and self._core:close(200, "Goodbye")
  if unconfirmed > 0 then self._lost = (self._lost or 0) + unconfirmed end
  if not ok then
    self._calls:fail(err) -- of one that is being opened again
    self:_ended(err, true)
    return true
  end
  local call = session:expect(self._calls, "channel.close")
  self:_ended(err, true)
  local result
  session.closing[self._calls] = true
  result, err = session:await(call, timeout or self.timeout)
  session.closing[self._calls] = nil
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
