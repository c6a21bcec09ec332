--- Each message of the queue is a POST to UPSTREAM_URL. A message is acked when the upstream has taken it (2xx).
--
-- | the upstream | the message |
-- | --- | --- |
-- | cannot be reached, says nothing in time, 5xx, 408 | comes again after 1, 2, 4, … seconds, six times, and is parked then |
-- | 429 or 503 with Retry-After | comes again when it says |
-- | any other status | is parked at once, in `upstream.dead` |
--
-- A crash between the upstream's answer and the ack brings a message twice: the header Idempotency-Key tells.
-- When too many calls fail in a row the breaker stops them all, and tries one after a pause.
local mr = require "moonrabbit"
local post = require "post"

local url = os.getenv "UPSTREAM_URL" or "http://127.0.0.1:9000/"
-- An upstream may ask for patience, up to this many seconds.
local MOST_PATIENT = 300

local function after(answer)
  local seconds = tonumber(answer.headers["retry-after"])
  if seconds and seconds >= 0 then return math.min(seconds, MOST_PATIENT) end
end

local function call(message)
  local answer, err = post(url, message.body, {
    ["Content-Type"] = message.properties.content_type or "application/octet-stream",
    ["Idempotency-Key"] = message.message_id,
  }, 5)
  if not answer then return nil, err end
  local status = answer.status
  if status >= 200 and status < 300 then return true end
  local text = ("the upstream answered %d: %s"):format(status, answer.body:sub(1, 200))
  if (status == 429 or status == 503) and after(answer) then return mr.outcome.retry(after(answer)) end
  if status >= 500 or status == 408 or status == 429 then return nil, text end
  return nil, mr.permanent(text)
end

return mr.app {
  name = "upstream",
  queues = { ["upstream.orders"] = { type = "quorum" } },
  consumers = {
    {
      queue = "upstream.orders", concurrency = 8, timeout = 15, handler = call,
      retry = mr.retry.exponential { first = 1, factor = 2, max = 60, attempts = 6, jitter = 0.2 },
      breaker = { failures = 50, within = 10, pause = 5 },
    },
  },
}
