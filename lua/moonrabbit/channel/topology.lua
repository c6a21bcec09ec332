--- The methods of a channel that declare, bind and delete, and those about flow and transactions.
-- @module moonrabbit.channel

local options = require "moonrabbit.options"

local check, argument = options.check, options.argument
local shortstr, boolean, seconds, integer = options.shortstr, options.boolean, options.seconds, options.integer

---@class moonrabbit.Channel
local Channel = {}

---@class moonrabbit.TimeoutOptions
---@field timeout number?  seconds; the channel's by default

---@class moonrabbit.NoWaitOptions : moonrabbit.TimeoutOptions
---@field no_wait boolean?  the broker does not answer: `true` at once, and a failure ends the channel; false by default

-- Options of every call.
local common = { timeout = seconds }
local with_nowait = { timeout = seconds, no_wait = boolean }

local function done(result, err)
  if result then return true end
  return nil, err
end

-- Calls; what the broker grants (later too, when nobody waits any more) is told to the record of what is to
-- come back: record[what](record, ...).
local function recorded(self, method, fields, opts, what, ...)
  local record = self.connection._record
  if not record then return self:_rpc(method, fields, opts) end
  local a, b, c, d, e = ...
  local function note() record[what](record, a, b, c, d, e) end
  local result, err = self:_rpc(method, fields, opts, note)
  if result then note() end
  return result, err
end

-- AMQP's "" is the queue that was declared last on the channel; the broker's own memory of it is lost with
-- the connection.
local function last_queue(self, queue)
  return queue == "" and self._last_queue or queue
end

-- ---- Exchanges --------------------------------------------------------------------------------------

---@class moonrabbit.ExchangeDeclareOptions : moonrabbit.NoWaitOptions
---@field type string?          "direct" (the default), "fanout", "topic", "headers", or a plugin's
---@field durable boolean?      outlives a restart of the broker; false by default
---@field auto_delete boolean?  goes when the last binding from it does; false by default
---@field internal boolean?     nobody may publish to it, only exchanges bound to it; false by default
---@field passive boolean?      only checks that it exists; false by default
---@field arguments table?      such as `alternate-exchange`

local exchange_declare_options = options.merge(with_nowait, {
  type = shortstr, passive = boolean, durable = boolean, auto_delete = boolean, internal = boolean,
  arguments = options.table,
})

--- Declares an exchange, or with `passive` only checks that it exists.
--- exchange.declare; 406 when it exists with other properties, 404 when passive and unknown.
---@param exchange string
---@param opts moonrabbit.ExchangeDeclareOptions?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_declare(exchange, opts)
  argument("Channel:exchange_declare", "exchange", exchange, shortstr)
  opts = check("Channel:exchange_declare", opts, exchange_declare_options)
  local fields = {
    exchange = exchange, type = opts.type or "direct", passive = opts.passive, durable = opts.durable,
    auto_delete = opts.auto_delete, internal = opts.internal, arguments = opts.arguments, nowait = opts.no_wait,
  }
  return done(recorded(self, "exchange.declare", fields, opts, "exchange_declared", fields))
end

---@class moonrabbit.ExchangeDeleteOptions : moonrabbit.NoWaitOptions
---@field if_unused boolean?  not while something is bound to it; false by default

local exchange_delete_options = options.merge(with_nowait, { if_unused = boolean })

--- Deletes an exchange; one that is not there is as good as deleted. exchange.delete; with `if_unused` 406
--- while something is bound to it.
---@param exchange string
---@param opts moonrabbit.ExchangeDeleteOptions?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_delete(exchange, opts)
  argument("Channel:exchange_delete", "exchange", exchange, shortstr)
  opts = check("Channel:exchange_delete", opts, exchange_delete_options)
  return done(recorded(self, "exchange.delete",
    { exchange = exchange, if_unused = opts.if_unused, nowait = opts.no_wait }, opts, "exchange_deleted", exchange))
end

---@class moonrabbit.BindOptions : moonrabbit.NoWaitOptions
---@field arguments table?  what a headers exchange matches, with `x-match`

---@class moonrabbit.UnbindOptions : moonrabbit.TimeoutOptions
---@field arguments table?  the binding's

---@class moonrabbit.ExchangeUnbindOptions : moonrabbit.NoWaitOptions
---@field arguments table?  the binding's

local bind_options = options.merge(with_nowait, { arguments = options.table })
local unbind_options = options.merge(common, { arguments = options.table })

local function exchange_binding(self, what, method, destination, source, routing_key, opts, valid)
  argument(what, "destination", destination, shortstr, 3)
  argument(what, "source", source, shortstr, 3)
  if routing_key ~= nil then argument(what, "routing_key", routing_key, shortstr, 3) end
  opts = check(what, opts, valid, 3)
  routing_key = routing_key or ""
  return done(recorded(self, method, {
    destination = destination, source = source, routing_key = routing_key, arguments = opts.arguments,
    nowait = opts.no_wait,
  }, opts, method == "exchange.bind" and "bound" or "unbound", "exchange_binding", destination, source, routing_key,
    opts.arguments))
end

--- Binds an exchange to an exchange: what `source` routes there goes on to `destination`.
--- exchange.bind, https://www.rabbitmq.com/docs/e2e; 404 when one of them is unknown.
---@param destination string
---@param source string
---@param routing_key string?  "" by default
---@param opts moonrabbit.BindOptions?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_bind(destination, source, routing_key, opts)
  local ok, err = exchange_binding(self, "Channel:exchange_bind", "exchange.bind", destination, source, routing_key,
    opts, bind_options)
  return ok, err
end

--- Takes a binding between exchanges away: the one with the same source, destination, key and arguments;
--- one that is not there is as good as gone. exchange.unbind
---@param destination string
---@param source string
---@param routing_key string?  "" by default
---@param opts moonrabbit.ExchangeUnbindOptions?
---@return true|nil, moonrabbit.Error?
function Channel:exchange_unbind(destination, source, routing_key, opts)
  local ok, err = exchange_binding(self, "Channel:exchange_unbind", "exchange.unbind", destination, source, routing_key,
    opts, bind_options)
  return ok, err
end

-- ---- Queues -----------------------------------------------------------------------------------------

---@class moonrabbit.QueueDeclareOptions : moonrabbit.NoWaitOptions
---@field durable boolean?      outlives a restart of the broker; false by default
---@field exclusive boolean?    for this connection only, and gone with it; false by default
---@field auto_delete boolean?  goes when its last consumer does; false by default
---@field passive boolean?      only asks about it; false by default
---@field arguments table?      such as `x-queue-type`, `x-dead-letter-exchange`, `x-message-ttl`, `x-max-length`: https://www.rabbitmq.com/docs/queues#optional-arguments

local queue_declare_options = options.merge(with_nowait, {
  passive = boolean, durable = boolean, exclusive = boolean, auto_delete = boolean, arguments = options.table,
})

--- Declares a queue, or with `passive` only asks about it. An empty or nil name lets the broker choose one.
--- queue.declare; 406 when it exists with other properties, 405 when it is another connection's
--- exclusive queue, 404 when passive and unknown. The answer tells its name, how many messages are ready
--- and how many consumers it has; with `no_wait` only the name.
---@param queue string?
---@param opts moonrabbit.QueueDeclareOptions?
---@return { queue: string, message_count: integer, consumer_count: integer }|nil, moonrabbit.Error?
function Channel:queue_declare(queue, opts)
  if queue ~= nil then argument("Channel:queue_declare", "queue", queue, shortstr) end
  opts = check("Channel:queue_declare", opts, queue_declare_options)
  local fields = {
    queue = queue or "", passive = opts.passive, durable = opts.durable, exclusive = opts.exclusive,
    auto_delete = opts.auto_delete, arguments = opts.arguments, nowait = opts.no_wait,
  }
  local record = self.connection._record
  local function note(reply)
    local name = reply == true and queue or reply.queue
    if name then self._last_queue = name end
    if record and name then record:queue_declared(name, fields) end
  end
  local result, err = self:_rpc("queue.declare", fields, opts, note)
  if result then note(result) end
  if result == true then return { queue = queue } end
  return result, err
end

--- Binds a queue to an exchange. queue.bind; 404 when one of them is unknown.
---@param queue string
---@param exchange string
---@param routing_key string? "" by default
---@param opts moonrabbit.BindOptions?
---@return true|nil, moonrabbit.Error?
function Channel:queue_bind(queue, exchange, routing_key, opts)
  argument("Channel:queue_bind", "queue", queue, shortstr)
  argument("Channel:queue_bind", "exchange", exchange, shortstr)
  if routing_key ~= nil then argument("Channel:queue_bind", "routing_key", routing_key, shortstr) end
  opts = check("Channel:queue_bind", opts, bind_options)
  routing_key = routing_key or ""
  if queue == "" and routing_key == "" then routing_key = last_queue(self, queue) end -- as the broker does
  queue = last_queue(self, queue)
  return done(recorded(self, "queue.bind", {
    queue = queue, exchange = exchange, routing_key = routing_key, arguments = opts.arguments,
    nowait = opts.no_wait,
  }, opts, "bound", "queue_binding", queue, exchange, routing_key, opts.arguments))
end

--- Takes a binding of a queue away: the one with the same exchange, key and arguments; one that is not
--- there is as good as gone. queue.unbind
---@param queue string
---@param exchange string
---@param routing_key string? "" by default
---@param opts moonrabbit.UnbindOptions?
---@return true|nil, moonrabbit.Error?
function Channel:queue_unbind(queue, exchange, routing_key, opts)
  argument("Channel:queue_unbind", "queue", queue, shortstr)
  argument("Channel:queue_unbind", "exchange", exchange, shortstr)
  if routing_key ~= nil then argument("Channel:queue_unbind", "routing_key", routing_key, shortstr) end
  opts = check("Channel:queue_unbind", opts, unbind_options)
  routing_key = routing_key or ""
  if queue == "" and routing_key == "" then routing_key = last_queue(self, queue) end
  queue = last_queue(self, queue)
  return done(recorded(self, "queue.unbind", {
    queue = queue, exchange = exchange, routing_key = routing_key, arguments = opts.arguments,
  }, opts, "unbound", "queue_binding", queue, exchange, routing_key, opts.arguments))
end

local function counted(result, err)
  if result == true then return true end
  if result then return result.message_count or 0 end
  return nil, err
end

--- Removes every message that is ready, not those that wait for their ack. queue.purge; 404 when it is
--- unknown. Answers how many messages went; `true` with `no_wait`.
---@param queue string
---@param opts moonrabbit.NoWaitOptions?
---@return integer|true|nil count, moonrabbit.Error?
function Channel:queue_purge(queue, opts)
  argument("Channel:queue_purge", "queue", queue, shortstr)
  opts = check("Channel:queue_purge", opts, with_nowait)
  return counted(self:_rpc("queue.purge", { queue = last_queue(self, queue), nowait = opts.no_wait }, opts))
end

---@class moonrabbit.QueueDeleteOptions : moonrabbit.NoWaitOptions
---@field if_unused boolean?  not while it has consumers; false by default
---@field if_empty boolean?   not while messages are ready; false by default

local queue_delete_options = options.merge(with_nowait, { if_unused = boolean, if_empty = boolean })

--- Deletes a queue; one that is not there is as good as deleted. queue.delete; 406 when `if_unused` or
--- `if_empty` does not hold. Answers how many messages went with it; `true` with `no_wait`.
---@param queue string
---@param opts moonrabbit.QueueDeleteOptions?
---@return integer|true|nil count, moonrabbit.Error?
function Channel:queue_delete(queue, opts)
  argument("Channel:queue_delete", "queue", queue, shortstr)
  opts = check("Channel:queue_delete", opts, queue_delete_options)
  queue = last_queue(self, queue)
  -- Its consumers here are cancelled by that, before the answer comes or after it: for good.
  self.connection:_deletes(queue, true)
  local result, err = recorded(self, "queue.delete", {
    queue = queue, if_unused = opts.if_unused, if_empty = opts.if_empty, nowait = opts.no_wait,
  }, opts, "queue_deleted", queue)
  if not result and err.kind ~= "timeout" then self.connection:_deletes(queue, nil) end
  return counted(result, err)
end

-- ---- Flow and transactions --------------------------------------------------------------------------

---@class moonrabbit.QosOptions : moonrabbit.TimeoutOptions
---@field global boolean?  for the whole channel; false by default

local qos_options = options.merge(common, { global = boolean })

--- How many unsettled deliveries the broker may have out: for each consumer started from now on, or
--- with `global` for the whole channel. 0: no bound. basic.qos,
--- https://www.rabbitmq.com/docs/consumer-prefetch
---@param prefetch_count integer 0 to 65535
---@param opts moonrabbit.QosOptions?
---@return true|nil, moonrabbit.Error?
function Channel:qos(prefetch_count, opts)
  argument("Channel:qos", "prefetch_count", prefetch_count, integer(0, 65535))
  opts = check("Channel:qos", opts, qos_options)
  -- From now on: a consumer that starts before the answer comes has it already.
  if opts.global then
    self._prefetch_global = prefetch_count
  else
    self._prefetch, self._told = prefetch_count, prefetch_count
  end
  return done(self:_rpc("basic.qos", { prefetch_count = prefetch_count, global = opts.global }, opts))
end

---@class moonrabbit.RecoverOptions : moonrabbit.TimeoutOptions
---@field requeue boolean?  true by default; on `false` RabbitMQ closes the connection (540)

local recover_options = options.merge(common, { requeue = boolean })

--- Gives every unsettled delivery of the channel back to its queue. basic.recover; RabbitMQ knows
--- only `requeue = true`, the default.
---@param opts moonrabbit.RecoverOptions?
---@return true|nil, moonrabbit.Error?
function Channel:recover(opts)
  opts = check("Channel:recover", opts, recover_options)
  local requeue = opts.requeue
  if requeue == nil then requeue = true end
  return done(self:_rpc("basic.recover", { requeue = requeue }, opts))
end

--- Makes the channel transactional: publishes and acks count from the next Channel:tx_commit on.
--- Confirms are faster and usually what is wanted. tx.select; 406 on a confirm channel.
---@param opts moonrabbit.TimeoutOptions?
---@return true|nil, moonrabbit.Error?
function Channel:tx_select(opts)
  opts = check("Channel:tx_select", opts, common)
  local ok, err = self:_rpc("tx.select", {}, opts)
  if not ok then return nil, err end
  self._tx = true
  return true
end

--- Commits: publishes and acks since the last commit or rollback take effect. tx.commit; 406 without
--- Channel:tx_select.
---@param opts moonrabbit.TimeoutOptions?
---@return true|nil, moonrabbit.Error?
function Channel:tx_commit(opts)
  return done(self:_rpc("tx.commit", {}, check("Channel:tx_commit", opts, common)))
end

--- Takes back publishes and acks since the last commit; the deliveries stay out, and can be settled
--- again by the channel's ack, nack and reject. tx.rollback; 406 without Channel:tx_select.
---@param opts moonrabbit.TimeoutOptions?
---@return true|nil, moonrabbit.Error?
function Channel:tx_rollback(opts)
  return done(self:_rpc("tx.rollback", {}, check("Channel:tx_rollback", opts, common)))
end

--- Asks the broker to stop or go on with deliveries. channel.flow; RabbitMQ takes only `true`, on `false`
--- it closes the connection (540): bound deliveries by Channel:qos.
---@param active boolean
---@param opts moonrabbit.TimeoutOptions?
---@return boolean|nil active, moonrabbit.Error?
function Channel:flow(active, opts)
  argument("Channel:flow", "active", active, boolean)
  opts = check("Channel:flow", opts, common)
  local result, err = self:_rpc("channel.flow", { active = active }, opts)
  if not result then return nil, err end
  return result.active ~= false
end

return Channel
