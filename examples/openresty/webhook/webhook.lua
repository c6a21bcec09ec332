--- Receives webhooks: POST /hook with the headers X-Delivery-Id and X-Signature (the HMAC-SHA1 of the body, in hex).
--
-- Senders repeat what they got no answer to. A delivery whose id is known to be done is answered 200 and not
-- published again; one that is under way in another request 409; one whose publish failed is forgotten, and 503
-- asks for it again.
local dedupe = require "moonrabbit.app.dedupe.shared"
local rabbit = require "moonrabbit.resty"

local webhook = {}

local QUEUE = "webhooks"
local LEASE = 30 -- seconds; longer than a publish may take
local secret = os.getenv "WEBHOOK_SECRET"
local seen

local function declare(conn)
  local channel, err = conn:channel()
  if not channel then return nil, err end
  local ok
  ok, err = channel:queue_declare(QUEUE, { durable = true })
  channel:close()
  return ok and true, err
end

function webhook.check()
  if not secret or secret == "" then error("WEBHOOK_SECRET is not set", 0) end
end

function webhook.start()
  seen = dedupe.new { dict = "webhooks", ttl = 24 * 3600 }
  rabbit.start { uri = os.getenv "AMQP_URL" or "amqp://guest:guest@127.0.0.1/", name = "webhooks", setup = declare }
end

local function answer(status, text)
  ngx.status = status
  if status == 503 or status == 409 then ngx.header["Retry-After"] = 1 end
  ngx.say(text)
end

-- Takes as long for a wrong signature as for the right one.
local function equal(a, b)
  if #a ~= #b then return false end
  local difference = 0
  for i = 1, #a do difference = difference + math.abs(a:byte(i) - b:byte(i)) end
  return difference == 0
end

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

function webhook.receive()
  local headers = ngx.req.get_headers()
  local id, signature = headers["X-Delivery-Id"], headers["X-Signature"]
  if type(id) ~= "string" or type(signature) ~= "string" or #id > 200 then
    return answer(400, "an id and a signature are needed")
  end
  local body, err = rabbit.request_body()
  if not body then return answer(413, tostring(err)) end
  if not equal(signature:lower(), hex(ngx.hmac_sha1(secret, body))) then
    return answer(401, "the signature is wrong")
  end

  local state
  state, err = seen:begin(id, LEASE)
  if state == "done" then return answer(200, "taken before") end
  if state == "running" then return answer(409, "being taken") end
  if not state then
    ngx.log(ngx.ERR, "webhook: ", tostring(err))
    return answer(503, "try again")
  end

  local ok
  ok, err = rabbit.publish(body, { routing_key = QUEUE, message_id = id, content_type = ngx.var.content_type })
  if not ok then
    seen:abort(id)
    ngx.log(ngx.WARN, "webhook: ", tostring(err))
    return answer(503, "try again")
  end
  seen:commit(id)
  answer(202, "taken")
end

return webhook
