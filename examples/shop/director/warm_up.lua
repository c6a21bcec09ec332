--- The main job, as fast as it goes: messages of 1 KiB published with confirms, delivered and acked, both at once.
local mr = require "moonrabbit"
local now = require "moonrabbit.runtime.native".now

local WINDOW, PREFETCH = 1000, 300

local function consume(conn, queue, result)
  local ch = conn:channel { prefetch = PREFETCH }
  local consumer = ch and ch:consume(queue)
  local seen = {}
  while consumer and result.delivered < result.published_of do
    local msg = consumer:receive(10)
    if not msg then break end
    local id = tonumber(msg.body:sub(1, 8))
    if not seen[id] then
      seen[id] = true
      result.delivered = result.delivered + 1
    end
    msg:ack()
  end
  result.consuming = now() - result.began
  if consumer then consumer:cancel() end
  result.over = true
end

--- Publishes `total` messages by one connection and takes them by another, all in this process.
-- { published, confirmed, delivered, publishing (seconds), consuming }, or nil, err.
return function(consuming, publishing, queue, total)
  local ch, err = publishing:channel()
  if not ch then return nil, err end
  local ok
  -- The broker itself removes it, should this process be killed.
  ok, err = ch:queue_declare(queue, { durable = true, arguments = { ["x-expires"] = 60000 } })
  if not ok then return nil, err end
  local publisher
  publisher, err = publishing:publisher { routing_key = queue, window = WINDOW }
  if not publisher then return nil, err end
  local result = { published = 0, published_of = total, confirmed = 0, delivered = 0, began = now(), over = false }
  mr.spawn(consume, consuming, queue, result)
  local filler = ("."):rep(1024 - 8)
  for i = 1, total do
    ok, err = publisher:send_async(("%08d"):format(i) .. filler)
    if not ok then return nil, err end
    result.published = i
  end
  ok, err = publisher:wait(30)
  result.publishing = now() - result.began
  result.confirmed = ok and total or total - #(err.failed or {}) - (err.pending or 0)
  while not result.over do mr.sleep(0.01) end
  publisher:close(5)
  ch:queue_delete(queue)
  ch:close()
  return result
end
