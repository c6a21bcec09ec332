-- examples/openresty/gateway: HTTP to AMQP, with its own nginx.conf, against a real broker.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local examples = require "support.nginx_examples"
local ok = broker.ok

local it = examples.it(it, pending)

describe("the gateway of the examples #resty", function()
  local at, queue = {}, "gateway-orders"

  before_each(function()
    if broker.not_ours() then return end
    examples.open(at)
    ok(at.channel:queue_declare(queue, { durable = true }))
    ok(at.channel:queue_purge(queue))
    ok(at.channel:queue_bind(queue, "amq.topic", "order.#"))
  end)

  after_each(function()
    if at.channel then at.channel:queue_delete(queue) end
    examples.close(at)
  end)

  local function start(what)
    local server = examples.start(at, "gateway", what)
    broker.eventually(function() return select(2, server:request "/healthz") == 200 end)
    return server
  end

  local function post(body, headers, path)
    path = path or "/publish/amq.topic/order.created"
    return at.server:request(path, { body = body, headers = headers, timeout = 10 })
  end

  local function status(...) return (select(2, post(...))) end

  -- Sends requests at once while the broker says nothing, and waits until `n` of them are answered.
  local function answers_of(requests, n)
    local answers = {}
    at.line.silent = true
    moonrabbit.run(function()
      for i = 1, requests do
        moonrabbit.spawn(function()
          local answer = { post("x" .. i) }
          answers[#answers + 1] = answer
        end)
      end
      broker.eventually(function() return #answers >= n end)
    end)
    at.line:cut() -- what is on its way goes again, and nginx has nothing to wait for
    at.line.silent = false
    return answers
  end

  it("answers 202 after the confirm, and headers become properties", function()
    start()
    local body, code, headers = post('{"id":1}', {
      ["Content-Type"] = "application/json", ["Content-Encoding"] = "identity", ["X-Correlation-Id"] = "c1",
      ["X-Message-Type"] = "order", ["X-Expiration"] = "60000", ["X-Amqp-Tenant"] = "blue",
      ["X-Amqp-Tag"] = { "a", "b" }, traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
      ["X-Other"] = "stays",
    })
    assert.equal(202, code, body or at.server:log())
    local message = examples.next_message(at, queue)
    assert.equal('{"id":1}', message.body)
    assert.equal("order.created", message.routing_key)
    assert.same({ tenant = "blue", tag = "a, b",
      traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" }, message.headers)
    local properties = message.properties
    assert.equal("application/json", properties.content_type)
    assert.equal("identity", properties.content_encoding)
    assert.equal("c1", properties.correlation_id)
    assert.equal("order", properties.type)
    assert.equal("60000", properties.expiration)
    assert.equal(headers["x-message-id"], properties.message_id)
    assert.matches("^%x+$", properties.message_id)

    headers = select(3, post("x", { ["X-Message-Id"] = "mine" }))
    assert.equal("mine", headers["x-message-id"])
    assert.equal("mine", examples.next_message(at, queue).properties.message_id)
  end)

  it("does not answer 202 before the confirm", function()
    start { workers = 1 }
    local answers = answers_of(1, 1)
    assert.equal(504, answers[1][2])
    assert.equal("no answer in time: it may have been taken\n", answers[1][1])
  end)

  it("reaches a queue by its name, without an exchange", function()
    start()
    assert.equal(202, status("by name", nil, "/publish//" .. queue))
    assert.equal("by name", examples.next_message(at, queue).body)
    assert.equal("no queue takes it\n", (post("x", nil, "/publish//no-such-queue")))
  end)

  it("answers the request's faults with their statuses", function()
    start()
    ok(at.channel:exchange_declare("gateway-internal", { internal = true, auto_delete = true }))
    ok(at.channel:queue_bind(queue, "gateway-internal", "k"))
    assert.equal(403, status("x", nil, "/publish/gateway-internal/k"))
    at.channel:exchange_delete "gateway-internal"
    assert.equal(404, status("x", nil, "/publish//no-such-queue"))
    assert.equal(404, status("x", nil, "/publish/no-such-exchange/k"))
    local _, code, headers = at.server:request "/publish/amq.topic/order.created"
    assert.equal(405, code)
    assert.equal("POST", headers.allow)
    assert.equal(413, status(("x"):rep(1100000)))
    assert.equal(202, status(("x"):rep(1000000)))
    assert.equal(400, status("x", { ["X-Expiration"] = "soon" }))
    assert.equal(400, status("x", { ["X-Correlation-Id"] = ("x"):rep(256) }))
    assert.equal(400, status("x", nil, "/publish/amq.topic/order." .. ("x"):rep(260)))
  end)

  it("publishes no body that nginx has put into a file", function()
    start { edits = { ["nginx.conf"] = { { "client_body_buffer_size 1m", "client_body_buffer_size 1k" } } } }
    assert.equal(413, status(("x"):rep(20000)))
    assert.equal(202, status "small")
    assert.equal("small", examples.next_message(at, queue).body)
  end)

  it("answers 503 with Retry-After while the broker is away, and tells the world nothing of it", function()
    start { workers = 1 }
    assert.equal(202, status "x")
    at.line:stop()
    broker.eventually(function() return select(2, at.server:request "/healthz") == 503 end)
    local body, code, headers = post "x"
    assert.equal(503, code)
    assert.equal("1", headers["retry-after"])
    assert.equal("try again\n", body)
    assert.equal(200, (select(2, at.server:request "/ping")))
    local to = broker.parsed()
    at.line = require "support.proxy".start(to.host, to.port, at.line.port)
    broker.eventually(function() return status "x" == 202 end)
  end)

  it("answers 503 with Retry-After at once when the queue is full", function()
    local edits = { { "entries = 2000", "entries = 2" }, { "TIMEOUT = 2", "TIMEOUT = 8" } }
    start { workers = 1, edits = { ["gateway.lua"] = edits } }
    local answers = answers_of(4, 2)
    for i = 1, 2 do
      assert.equal(503, answers[i][2])
      assert.equal("1", answers[i][3]["retry-after"])
    end
  end)

  it("answers 413 for what can never be taken", function()
    start { edits = { ["gateway.lua"] = { { "entries = 2000", "max_message_size = 1000, entries = 2000" } } } }
    assert.equal(413, status(("x"):rep(2000)))
    assert.equal(202, status "x")
  end)

  it("answers a call with its reply, and 504 without one", function()
    local server = start()
    ok(at.channel:queue_declare("gateway-double", { auto_delete = true }))
    ok(at.conn:consume("gateway-double", function(message)
      message:reply(tostring(tonumber(message.body) * 2), { content_type = "text/plain" })
      message:ack()
    end))
    moonrabbit.run(function()
      local answer, code, headers
      moonrabbit.spawn(function() answer, code, headers = server:request("/call/gateway-double", { body = "21" }) end)
      broker.eventually(function() return code end)
      assert.equal(200, code, answer)
      assert.equal("42", answer)
      assert.equal("text/plain", headers["content-type"])
    end)
    assert.equal(404, status("x", nil, "/call/no-such-queue"))
    ok(at.channel:queue_declare("gateway-silent", { exclusive = true }))
    assert.equal(504, status("x", nil, "/call/gateway-silent"))
  end)

  it("does not start with options that are wrong", function()
    assert.matches("invalid AMQP URI", (examples.refused(at, "gateway", { env = { AMQP_URL = "nonsense" } })))
  end)
end)
