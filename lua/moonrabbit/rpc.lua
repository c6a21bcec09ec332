--- Remote calls over direct reply-to: one reply consumer for each connection, started by the first call.
-- https://www.rabbitmq.com/docs/direct-reply-to
-- @module moonrabbit.rpc

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local pcall = require "moonrabbit.protect"

local huge = math.huge

local Rpc = {}
Rpc.__index = Rpc

local REPLY_TO = "amq.rabbitmq.reply-to"

local call_options = options.merge(options.publish, { timeout = options.seconds })
for _, name in ipairs { "reply_to", "correlation_id", "mandatory" } do call_options[name] = nil end
Rpc.options = call_options

function Rpc.new(connection)
  return setmetatable({ connection = connection, _serial = 0 }, Rpc)
end

-- What takes the replies: an entry among the channel's receivers, like a consumer.
local Replies = {}
Replies.__index = Replies

function Replies:_delivered()
  local pop, queue = self.pop, self.queue
  local message = pop(queue)
  while message do
    local id = message.properties.correlation_id
    local call = id and self.by_id[id]
    if call then -- else it comes too late
      self.by_id[id], self.by_seq[call.seq] = nil, nil
      call.reply = message
      call.condition:signal()
    end
    message = pop(queue)
  end
end

function Replies:_finish(err)
  self.ended = err
  for _, call in pairs(self.by_id) do
    call.err = err
    call.condition:signal()
  end
end

Replies._channel_ended = Replies._finish

-- The channel with the reply consumer; started when there is none.
local function start(connection, deadline, now)
  -- It does not come back with the connection: the next call starts another one.
  local channel, err = require("moonrabbit.channel").open(connection, connection._session,
    { confirm = true, timeout = math.max(0, deadline - now()) })
  if not channel then return nil, err end
  local queue, status = channel._core:consume { queue = REPLY_TO, consumer_tag = REPLY_TO, no_ack = true }
  if not queue then
    channel:_abandon()
    return nil, channel._session:refusal(status, "Connection:call")
  end
  local replies = setmetatable({ channel = channel, queue = queue, pop = queue.pop, by_id = {}, by_seq = {} }, Replies)
  channel._receivers[queue] = replies
  channel._rpc_failed = function(seq, failure)
    local call = replies.by_seq[seq]
    if call then
      call.err = failure
      call.condition:signal()
    end
  end
  local session = channel._session
  local ok
  ok, err = session:await(session:expect(channel._calls, "basic.consume", function() channel:_abandon() end),
    math.max(0, deadline - now()))
  if not ok then
    channel:_abandon()
    return nil, err
  end
  channel.timeout = connection.call_timeout
  return replies
end

-- Tasks that call at once share one start.
local function replies_of(self, deadline, now)
  local runtime = self.connection._runtime
  while self._starting do
    local left = deadline - now()
    if left <= 0 then return nil, self.connection._session:error("timeout", "no reply consumer in time") end
    self._starting:wait(left < huge and left or nil)
  end
  local replies = self._replies
  if replies and not replies.ended then return replies end
  local condition = runtime.condition()
  self._starting = condition
  local whole, err
  whole, replies, err = pcall(start, self.connection, deadline, now)
  self._replies = whole and replies or nil
  self._starting = nil
  condition:broadcast()
  if not whole then error(replies, 0) end
  return replies, err
end

-- Until there is a reply or an error.
local function wait(session, call, deadline, timeout)
  local now = session.runtime.now
  while not call.reply and not call.err do
    local left = deadline - now()
    if left <= 0 then
      call.err = session:error("timeout", ("no reply within %g s"):format(timeout))
    else
      session:block(call.condition, left)
    end
  end
end

function Rpc:call(body, opts)
  local connection = self.connection
  local runtime = connection._runtime
  local now = runtime.now
  local timeout = opts.timeout or connection.call_timeout
  local deadline = now() + timeout
  if not connection:is_open() then return nil, connection:_closed_error() end
  local replies, err = replies_of(self, deadline, now)
  if not replies then return nil, err end

  self._serial = self._serial + 1
  local id = tostring(self._serial)
  local request = {}
  for key, value in pairs(opts) do request[key] = value end
  request.reply_to, request.correlation_id, request.mandatory = REPLY_TO, id, true
  if request.persistent == nil and request.delivery_mode == nil then request.persistent = false end
  request.timeout = math.max(0, deadline - now())

  local call = { condition = runtime.condition() }
  local channel = replies.channel
  local confirmation
  confirmation, err = channel:publish_async(body, request)
  if not confirmation then return nil, err end
  if replies.ended then return nil, replies.ended end
  local _, seq = core.outcome(confirmation)
  call.seq = seq
  replies.by_id[id], replies.by_seq[seq] = call, call
  local whole, thrown = pcall(wait, channel._session, call, deadline, timeout)
  replies.by_id[id], replies.by_seq[seq] = nil, nil
  -- Its failure is the caller's alone to hear of.
  channel._failures = {}
  if not whole then error(thrown, 0) end -- its task was cancelled
  if call.reply then return call.reply end
  return nil, call.err
end

return Rpc
