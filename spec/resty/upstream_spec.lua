-- examples/openresty/upstream: an app in nginx workers that calls an HTTP upstream, with its own nginx.conf, against a real
-- broker.
local broker = require "support.broker"
local examples = require "support.nginx_examples"
local http_server = require "support.http_server"
local native = require "moonrabbit.runtime.native"
local ok = broker.ok

local it = examples.it(it, pending)

describe("the upstream of the examples #resty", function()
  local at = {}
  local upstream
  local told = {} -- body -> what the upstream answers, in turn; the last one again and again
  local times = {} -- body -> when it was called
  local cut -- whether it was stopped in an answer without end

  local function clear()
    for _, queue in ipairs { "upstream.orders", "upstream.dead" } do at.channel:queue_delete(queue) end
  end

  local function answer_without_end(client)
    local piece, sent = ("x"):rep(65536), client:write "HTTP/1.1 200 OK\r\n\r\n"
    for _ = 1, 1000 do sent = sent and client:write(piece) end
    cut = not sent
    return ""
  end

  local function answer(request, client)
    local body = request.body
    times[body] = times[body] or {}
    table.insert(times[body], native.now())
    local answers = told[body] or { "200" }
    local said = #answers > 1 and table.remove(answers, 1) or answers[1]
    if said == "silence" then return nil end
    if said == "hang up" then return "" end
    if said == "endless" then return answer_without_end(client) end
    if said == "nonsense" then return "SSH-2.0-OpenSSH\r\n" end
    local status, retry_after = said:match "^(%d+) ?(%d*)$"
    return http_server.response(tonumber(status), "it says " .. status,
      retry_after ~= "" and "x-empty:\r\nretry-after: " .. retry_after .. "\r\n" or "")
  end

  before_each(function()
    if broker.not_ours() then return end
    examples.open(at)
    clear()
    told, times = {}, {}
    upstream = http_server.start(answer)
  end)

  after_each(function()
    if upstream then upstream.stop() end
    upstream = nil
    if at.channel then clear() end
    examples.close(at)
  end)

  local function start(what)
    what = what or {}
    what.env = { UPSTREAM_URL = upstream.uri:gsub("guest:guest@", "") .. "/orders" }
    examples.start(at, "upstream", what)
    broker.eventually(function() return select(2, at.server:request "/readyz") == 200 end, 20, "the workers are ready")
  end

  local function publish(body, properties)
    local opts = { routing_key = "upstream.orders", message_id = "id-" .. body, content_type = "text/plain" }
    for name, value in pairs(properties or {}) do opts[name] = value end
    ok(at.channel:publish_async(body, opts))
  end

  local function calls(body) return #(times[body] or {}) end

  local function called(body, n)
    broker.eventually(function() return calls(body) >= n end, 20, body .. " is called " .. n .. " times")
  end

  local function metric(pattern)
    broker.eventually(function() return ((at.server:request "/metrics") or ""):find(pattern) end, 20, pattern)
  end

  it("is called, again where that can help, and what cannot succeed is parked", function()
    start()
    told.flaky, told.away, told.busy = { "500", "200" }, { "hang up", "200" }, { "429 1", "200" }
    told.odd, told.slow, told.wrong = { "nonsense", "200" }, { "408", "200" }, { "422" }
    local expected = { flaky = 2, away = 2, busy = 2, odd = 2, slow = 2, wrong = 1 }
    for i = 1, 40 do
      expected["order" .. i] = 1
      if i % 4 == 0 then
        told["order" .. i], expected["order" .. i] = { "503", "200" }, 2
      end
    end
    for body in pairs(expected) do publish(body) end
    ok(at.channel:wait_for_confirms(10))
    -- A reload in the middle of it: nothing is lost.
    broker.eventually(function() return #upstream.requests > 10 end)
    at.server:reload()
    for body, n in pairs(expected) do
      called(body, n)
      assert.equal(n, calls(body), body .. "\n" .. at.server:log())
    end
    local request = upstream.requests[1]
    assert.equal("POST", request.method)
    assert.equal("/orders", request.target)
    assert.equal("text/plain", request.headers["content-type"])
    assert.equal("id-" .. request.body, request.headers["idempotency-key"])
    local dead = examples.next_message(at, "upstream.dead")
    assert.equal("wrong", dead.body)
    assert.matches("the upstream answered 422: it says 422", dead.headers["moonrabbit-error"])
    broker.eventually(function()
      return ok(at.channel:queue_declare("upstream.orders", { passive = true })).message_count == 0
    end)
    metric 'moonrabbit_messages_settled_total{queue="upstream.orders",outcome="dead_letter"} 1\n'
  end)

  it("says when to come again, within limits", function()
    start { edits = { ["orders.lua"] = { { "MOST_PATIENT = 300", "MOST_PATIENT = 3" } } } }
    told.patient, told.greedy = { "429 3", "200" }, { "503 100000", "200" }
    publish "patient"
    publish "greedy"
    for _, body in ipairs { "patient", "greedy" } do
      called(body, 2)
      -- Without its word it would be a second, and a fifth more at most.
      assert.truthy(times[body][2] - times[body][1] > 2, body)
    end
  end)

  it("is given up after as many attempts as are allowed", function()
    start { edits = { ["orders.lua"] = { { "attempts = 6", "attempts = 2" } } } }
    told.broken = { "500" }
    publish "broken"
    local dead = examples.next_message(at, "upstream.dead")
    assert.equal("broken", dead.body)
    assert.equal(2, calls "broken")
  end)

  it("is not waited for when it says nothing", function()
    start { edits = { ["orders.lua"] = { { "}, 5)", "}, 1)" }, { "timeout = 15", "timeout = 300" } } } }
    told.silent = { "silence", "200" }
    publish "silent"
    called("silent", 2)
  end)

  it("is not listened to without end", function()
    start()
    told.endless = { "endless" }
    publish "endless"
    broker.eventually(function() return cut end, 20, "the answer is cut short")
    metric 'moonrabbit_messages_settled_total{queue="upstream.orders",outcome="ok"} 1\n'
    assert.equal(1, calls "endless")
  end)

  it("is left alone when it fails again and again", function()
    -- What fails is parked: it would come again while other specs run.
    local edits = { { "failures = 50, within = 10, pause = 5", "failures = 3, pause = 600" },
      { "attempts = 6", "attempts = 1" } }
    start { workers = 1, edits = { ["orders.lua"] = edits } }
    for i = 1, 20 do
      told["bad" .. i] = { "500" }
      publish("bad" .. i)
    end
    metric 'moonrabbit_breaker_open{queue="upstream.orders"} 1\n'
  end)

  it("gets no header that a message has made up", function()
    start()
    publish("sly", { content_type = "text/plain\r\nX-Made-Up: 1" })
    called("sly", 1)
    local headers
    for _, request in ipairs(upstream.requests) do headers = request.body == "sly" and request.headers or headers end
    assert.is_nil(headers["x-made-up"])
    assert.equal("text/plain  X-Made-Up: 1", headers["content-type"])
  end)

  it("does not start with a script that is broken", function()
    local edit = { "return mr.app {", "return mr.app { oops = 1," }
    local why = examples.refused(at, "upstream", { edits = { ["orders.lua"] = { edit } } })
    assert.matches("unknown option 'oops'", why)
  end)
end)
