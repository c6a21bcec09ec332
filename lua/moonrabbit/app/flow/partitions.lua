--- Partitions: the work of one queue in order, and yet on many machines.
--
-- `partitions = 4` puts a consistent-hash exchange `<queue>.partitions` where the queue would be, and behind it the
-- queues `<queue>.1` to `<queue>.4`, each with a single active consumer. Messages of one routing key (or, with
-- `by`, of one header or property) always go to the same queue, which one process at a time works on. What the
-- queue was to be bound to, the exchange is bound to. The broker needs the plugin rabbitmq_consistent_hash_exchange.
-- @module moonrabbit.app.flow.partitions

local partitions = {}

local function copy(map)
  local all = {}
  for key, value in pairs(map or {}) do all[key] = value end
  return all
end

local function hash_arguments(by)
  if not by then return nil end
  if by.header then return { ["hash-header"] = by.header } end
  return { ["hash-property"] = by.property }
end

--- Why a queue cannot be partitioned, or nil.
---@param queue moonrabbit.AppQueueOptions
---@return string?
function partitions.problem(queue)
  if queue.passive then return "a queue that somebody else declares cannot be partitioned" end
  if queue.exclusive or queue.auto_delete then return "an exclusive or auto_delete queue cannot be partitioned" end
  if queue.type == "stream" then return "a stream has no single active consumer" end
end

--- Puts exchange and queues of the partitions into a plan; the consumers, one for each.
---@param plan table its exchanges and queues are changed
---@param consumer table compiled
---@return table[] consumers
function partitions.expand(plan, consumer)
  local spec = consumer.partitions
  local queue = plan.queues[consumer.queue]
  local exchange = spec.exchange or consumer.queue .. ".partitions"
  plan.exchanges[exchange] = {
    type = "x-consistent-hash", durable = queue.durable, bind = queue.bind, arguments = hash_arguments(spec.by),
  }
  plan.queues[consumer.queue] = nil
  local consumers = {}
  for i = 1, spec.count do
    local name = consumer.queue .. "." .. i
    local part = copy(queue)
    part.arguments = copy(queue.arguments)
    part.arguments["x-single-active-consumer"] = true
    part.bind = { { exchange, "1" } } -- the weight: all the same
    plan.queues[name] = part
    consumers[i] = copy(consumer)
    consumers[i].queue, consumers[i].partition, consumers[i].partitioned = name, i, consumer.queue
  end
  return consumers
end

return partitions
