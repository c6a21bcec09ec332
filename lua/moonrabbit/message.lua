--- Message: what a consumer, `get` or a returned publish yields.
--
-- An object of the C core. Its fields are made when they are first read, and cannot be set.
-- @module moonrabbit.message

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local trace = require "moonrabbit.trace"

local core_ack, core_settle, core_owner = core.ack, core.settle, core.owner
local boolean, shortstr, seconds = options.boolean, options.shortstr, options.seconds

---@class moonrabbit.Message
---@field body string          any bytes
---@field exchange string      where it was published to
---@field routing_key string
---@field redelivered boolean  whether it has been delivered before
---@field delivery_tag integer its number on the channel
---@field consumer_tag string  of a consumer's
---@field message_id string?   properties.message_id, for less
---@field properties table<string, any> the names are Channel:publish's: content_type, correlation_id, …
---@field headers table<string, any>    empty when it has none
---@field channel moonrabbit.Channel
---@field message_count integer? of `get`: how many are left
---@field reply_code integer?    of a returned publish: why, such as 312
---@field reply_text string?     of a returned publish: why, such as "NO_ROUTE"
local methods = core.message_methods

-- `level`: of whoever called the method, for error().
local function not_settled(message, status, what, level)
  local owner = core_owner(message)
  if status == "closed" then return nil, owner:_gone() end
  if status == "settled" then
    error(("%s: delivery %s was settled before"):format(what, tostring(message.delivery_tag)), level)
  elseif status == "unknown_tag" then
    error(("%s: delivery %s has nothing to settle (no_ack, or a returned message)"):format(what,
      tostring(message.delivery_tag)), level)
  end
  return nil, owner._session:refusal(status, what, level)
end

--- Acks this delivery: the broker may forget the message. Acks leave gathered: with the next write,
--- or within ack_delay (1 ms). Acking a second time throws; when the channel or connection of the
--- message is gone, the answer is nil, err of kind `closed`, and the broker delivers it again.
--- basic.ack, https://www.rabbitmq.com/docs/confirms#acknowledgement-modes
---@return true|nil, moonrabbit.Error?
function methods:ack()
  local flush, owner = core_ack(self)
  if flush == nil then
    local none, err = not_settled(self, owner, "Message:ack", 4) -- core.acker's function is between
    return none, err
  end
  local session = owner._session
  if flush then session:try_flush() else session:touch() end
  return true
end

-- Nearly all acks change nothing for the session: those the core takes without a call of Lua.
methods.ack = core.acker(methods.ack, function(owner) owner._session:try_flush() end)

---@class moonrabbit.RequeueOptions
---@field requeue boolean?  true by default

local settle_options = { requeue = boolean }

local function settle(message, kind, requeue, what)
  local flush, owner = core_settle(message, kind, requeue)
  if flush == nil then
    local none, err = not_settled(message, owner, what, 4)
    return none, err
  end
  local session = owner._session
  if flush then session:try_flush() else session:touch() end
  return true
end

--- Gives this delivery back: to its queue, or with `requeue = false` to the dead-letter exchange of
--- the queue, if it has one. basic.nack
---@param opts moonrabbit.RequeueOptions?
---@return true|nil, moonrabbit.Error?
function methods:nack(opts)
  if opts ~= nil then options.check("Message:nack", opts, settle_options) end
  local ok, err = settle(self, "nack", not opts or opts.requeue ~= false, "Message:nack")
  return ok, err
end

--- Rejects this delivery: it is dead-lettered or dropped, or with `requeue = true` goes back to its
--- queue. basic.reject
---@param opts moonrabbit.RejectOptions?
---@return true|nil, moonrabbit.Error?
function methods:reject(opts)
  if opts ~= nil then options.check("Message:reject", opts, settle_options) end
  local ok, err = settle(self, "reject", opts and opts.requeue or false, "Message:reject")
  return ok, err
end

--- Answers a request (Connection:call): publishes `body` to the queue named by properties.reply_to,
--- with the request's correlation_id, on the message's own channel.
--- On a channel with confirms it waits, and err of kind `unroutable` tells that the queue is gone. Not so
--- for direct reply-to: the broker returns a mandatory publish there although the caller gets it, so
--- such a reply is not mandatory.
--- https://www.rabbitmq.com/docs/direct-reply-to
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish; not persistent by default
---@return true|nil, moonrabbit.Error?
function methods:reply(body, opts)
  local properties = self.properties
  local reply_to = properties.reply_to
  options.argument("Message:reply", "body", body, options.string)
  local channel = core_owner(self)
  if reply_to == nil or reply_to == "" then
    return nil, channel._session:error("unroutable", "the message asks for no reply: it has no reply_to")
  end
  local all = { exchange = "", routing_key = reply_to, correlation_id = properties.correlation_id, persistent = false }
  if reply_to:find("amq.rabbitmq.reply-to", 1, true) == 1 then all.mandatory = false end
  if opts ~= nil then
    options.check("Message:reply", opts, options.merge(options.publish, { timeout = seconds }))
    for key, value in pairs(opts) do all[key] = value end
  end
  return channel:publish(body, all)
end

--- Headers that pass this message's trace on: `headers = msg:trace()`. What an app's handler publishes has them by itself.
--- nil: it has no valid `traceparent`. See moonrabbit.trace.
---@return { traceparent: string, tracestate: string? }|nil
function methods:trace()
  return (trace.of(self))
end

---@class moonrabbit.ForwardOptions
---@field set table?                headers to add or to replace
---@field remove string[]?          names of headers to leave out
---@field remove_properties string[]? names of properties to leave out, such as "expiration"
---@field mandatory boolean?        true by default on a confirm channel, else false
---@field channel moonrabbit.Channel? the message's own by default
---@field timeout number?           seconds; the channel's by default

local forward_options = {
  set = options.table, remove = options.table, remove_properties = options.table, mandatory = boolean,
  timeout = seconds, channel = options.table,
}

--- Sends this message on: body, properties and headers byte for byte as they came, but for the
--- headers and properties named in `opts`. It is not settled by this. On a channel with confirms it waits
--- for the confirm, and err.kind is as for Channel:publish.
---@param exchange string
---@param routing_key string? the message's own by default
---@param opts moonrabbit.ForwardOptions?
---@return true|nil, moonrabbit.Error?
function methods:forward(exchange, routing_key, opts)
  options.argument("Message:forward", "exchange", exchange, shortstr)
  if routing_key ~= nil then options.argument("Message:forward", "routing_key", routing_key, shortstr) end
  opts = options.check("Message:forward", opts, forward_options)
  local channel = opts.channel or core_owner(self)
  local now = channel._runtime.now
  local deadline = now() + (opts.timeout or channel.timeout)
  local confirmation, err = channel:_forward(self, exchange, routing_key or self.routing_key, opts, opts.timeout)
  if not confirmation then return nil, err end
  if confirmation == true then return true end
  return channel:_wait(confirmation, math.max(0, deadline - now()), true)
end

return methods
