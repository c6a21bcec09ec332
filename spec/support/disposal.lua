-- What specs of retries and dead letters share: a consumer's disposal on the real broker, with names of its own.
local broker = require "support.broker"
local disposal = require "moonrabbit.app.disposal"
local ok = broker.ok

local support = {}

local Bench = {}
Bench.__index = Bench

--- Connections to consume and to publish, a queue, and its disposal. options: queue (arguments), consumer (fields of
--- it), log.
function support.start(options)
  options = options or {}
  local name = broker.unique "retry"
  local self = setmetatable({ name = name, queue = name .. ".q", logged = {} }, Bench)
  self.conn, self.out = broker.connect(options.connect), broker.connect(options.connect)
  self.ch = ok(self.conn:channel { prefetch = 100 })
  ok(self.ch:queue_declare(self.queue, { durable = true, arguments = options.queue }))
  local consumer = { queue = self.queue }
  for key, value in pairs(options.consumer or {}) do consumer[key] = value end
  self.d = disposal.new {
    app = name, consumer = consumer, publisher = function() return self:publisher() end,
    log = function(level, text) table.insert(self.logged, level .. ": " .. text) end, now = options.now,
  }
  if options.setup ~= false then ok(self.d:setup(self.ch)) end
  return self
end

--- The channel to publish on: a new one when the broker has closed the last.
function Bench:publisher()
  if not self.publishes or not self.publishes:is_open() then
    local channel, err = self.out:channel { confirm = true }
    if not channel then return nil, err end
    self.publishes = channel
  end
  return self.publishes
end

function Bench:consumer()
  self.consuming = self.consuming or ok(self.ch:consume(self.queue))
  return self.consuming
end

--- Publishes to the queue and takes the message.
function Bench:deliver(body, opts)
  opts = opts or {}
  if not opts.exchange then opts.routing_key = self.queue end
  ok(self:publisher():publish(body or "body", opts))
  return self:receive()
end

function Bench:receive(seconds)
  return ok(self:consumer():receive(seconds or 10))
end

--- The only message of another queue, acked; nil when it has none.
function Bench:take(queue)
  local message = ok(self:publisher():get(queue, { no_ack = true }))
  return message or nil
end

--- How many messages are ready in a queue.
function Bench:count(queue)
  local channel = ok(self.out:channel())
  local answer = ok(channel:queue_declare(queue, { passive = true }))
  channel:close()
  return answer.message_count
end

--- Deletes everything of this bench.
function Bench:finish()
  local ladder = self.d.ladder
  local conn = broker.connect()
  local ch = ok(conn:channel())
  local names = { ladder.orphans, ladder.home, self.queue, self.name .. ".dead" }
  local steps = { 100, 200, 300, 500, 1000, 2000, 5000, 60000 }
  for _, step in ipairs(steps) do names[#names + 1] = ladder:wait_name(step) end
  for _, name in ipairs(names) do
    ok(ch:queue_delete(name))
    ok(ch:exchange_delete(name))
  end
  broker.close_all()
end

return support
