-- moonrabbit.resty's consumers: handlers in the workers of nginx.
local broker = require "support.broker"
local cjson = require "cjson.safe"
local native = require "moonrabbit.runtime.native"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local http = [[
  lua_shared_dict seen 1m;
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    local seen = ngx.shared.seen
    rabbit.start { uri = %q, reconnect = { first = 0.05, max = 0.2 }, exit_timeout = 10 }
    rabbit.consume {
      queue = %q, prefetch = 20, concurrency = 4, error_delay = 0.1,
      handler = function(message)
        local body = message.body
        local running = seen:incr("running", 1, 0)
        if running > (seen:get "most" or 0) then seen:set("most", running) end
        local n = seen:incr(body, 1, 0)
        repeat ngx.sleep(0.002) until not body:find "held" or seen:get "let go"
        seen:incr("running", -1)
        if body:find "bad" and n < 3 then error("bad the " .. n .. ". time") end
        seen:incr("done", 1, 0)
        assert(rabbit.publish(body .. "!", { routing_key = %q }))
        message:ack()
      end,
    }
  }
]]

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /let_go { content_by_lua_block { ngx.shared.seen:set("let go", true) } }
  location /seen {
    content_by_lua_block {
      local all = {}
      for _, key in ipairs(ngx.shared.seen:get_keys(0)) do all[key] = ngx.shared.seen:get(key) end
      all.stats = require "moonrabbit.resty".stats()
      all.stats.reason = nil
      ngx.say(require "cjson.safe".encode(all))
    }
  }
]]

describe("consuming in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local conn, channel, queue, answers, server, line

  local function start(workers)
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    server = nginx.start {
      workers = workers, server = locations,
      http = http:format(broker.uri { host = "127.0.0.1", port = line.port }, queue, answers),
    }
    server:ready "/ping"
  end

  local function seen() return cjson.decode((server:request "/seen") or "") or { stats = {} } end

  before_each(function()
    conn = broker.connect()
    channel = ok(conn:channel { confirm = true })
    queue, answers = broker.unique "in", broker.unique "out"
    ok(channel:queue_declare(queue))
    ok(channel:queue_declare(answers))
  end)

  after_each(function()
    if server then server:stop() end
    if line then line:stop() end
    server, line = nil, nil
    channel:queue_delete(queue)
    channel:queue_delete(answers)
    broker.close_all()
  end)

  local function send(...)
    for _, body in ipairs { ... } do ok(channel:publish(body, { routing_key = queue })) end
  end

  local function count(name) return ok(channel:queue_declare(name, { passive = true })).message_count end

  -- The answers, each with how often it came.
  local function answered()
    local all = {}
    while true do
      local message = ok(channel:get(answers, { no_ack = true }))
      if not message then return all end
      all[message.body] = (all[message.body] or 0) + 1
    end
  end

  it("handles messages, so many at once, in every worker", function()
    start(2)
    broker.eventually(function()
      return ok(channel:queue_declare(queue, { passive = true })).consumer_count == 2
    end, 20, "both workers consume")
    for i = 1, 200 do ok(channel:publish_async("m" .. i, { routing_key = queue })) end
    broker.eventually(function() return seen().done == 200 end)
    broker.eventually(function() return count(answers) == 200 end)
    local all = answered()
    for i = 1, 200 do assert.equal(1, all["m" .. i .. "!"]) end
    local most = seen().most
    assert.truthy(most > 1 and most <= 8, most)
    assert.equal("open", seen().stats.consuming)
  end)

  it("gives back what a handler threw at", function()
    start(1)
    send("good", "bad")
    broker.eventually(function() return seen().done == 2 end)
    assert.equal(3, seen().bad)
    server:logged "%[error%][^\n]*moonrabbit: a handler of the consumer on '[^']+' threw: [^\n]*bad the 1. time"
  end)

  it("goes on after a lost connection and a deleted queue", function()
    start(1)
    send "one"
    broker.eventually(function() return seen()["one"] end)
    line:cut()
    send "two"
    broker.eventually(function() return seen()["two"] end)
    ok(channel:queue_delete(queue))
    server:logged "the consumer on '[^']+' has ended"
    ok(channel:queue_declare(queue))
    send "three"
    broker.eventually(function() return seen()["three"] end)
  end)

  it("waits for a queue that is not there yet, on whichever connection", function()
    ok(channel:queue_delete(queue))
    start(1)
    server:logged "the consumer on '[^']+' has ended: [^\n]*no queue"
    line:cut()
    server:logged "consuming: [^\n]*; trying again in"
    ok(channel:queue_declare(queue))
    send "one"
    broker.eventually(function() return seen()["one"] end)
  end)

  -- A worker whose consumer has a queue of its own; `text` is in the function that declares it, with n, how often it ran.
  local function start_own(text, options)
    server = nginx.start {
      server = locations,
      http = ([[
        lua_shared_dict seen 1m;
        init_worker_by_lua_block {
          local rabbit, seen = require "moonrabbit.resty", ngx.shared.seen
          rabbit.start { uri = os.getenv "AMQP_URL", reconnect = { first = 0.3, max = 0.3, jitter = 0 }, %s }
          rabbit.consume {
            queue = function(conn)
              local n = seen:incr("asked", 1, 0)
              %s
              local name = assert(assert(conn:channel()):queue_declare("", { exclusive = true })).queue
              seen:set("own", name)
              return name
            end,
            handler = function(message)
              seen:incr(message.body, 1, 0)
              while message.body == "held" and not seen:get "let go" do ngx.sleep(0.01) end
              message:ack()
            end,
          }
        }
      ]]):format(options or "", text),
    }
    server:ready "/ping"
  end

  local function consumes()
    local own = broker.eventually(function() return seen().own end)
    ok(channel:publish("one", { routing_key = own }))
    broker.eventually(function() return seen().one == 1 end)
  end

  it("consumes from what a function declares, and asks it again, with pauses, when that fails", function()
    local began = native.now()
    start_own [[
      if n == 1 then error "thrown by queue" end
      if n == 2 then return nil end
      if n == 3 then return nil, require "moonrabbit.errors".new { kind = "closed", message = "not yet" } end
    ]]
    for _, why in ipairs { "thrown by queue", "the function 'queue' named none", "not yet" } do
      server:logged("the consumer on '%(its own%)' has ended: [^\n]*" .. why .. "[^\n]*; starting again in 0.3 s")
    end
    consumes()
    assert.equal(4, seen().asked)
    assert.truthy(native.now() - began >= 0.9)
  end)

  it("begins anew with a new connection when something is thrown beside the function", function()
    start_own [[
      if n == 1 then
        conn.consume = function()
          return { channel = { on = function() end }, reason = function() error "thrown by reason" end }
        end
        return "none"
      end
      if n == 2 then error(setmetatable({}, { __tostring = function() error "no text" end })) end
    ]]
    server:logged "consuming: the consumer on '%(its own%)': [^\n]*thrown by reason"
    server:logged "the consumer on '%(its own%)' has ended: [^\n]*an error object"
    consumes()
    assert.equal(3, seen().asked)
    assert.equal(2, (select(2, server:log():gsub("consuming: connected to", ""))))
  end)

  it("handles sixteen at once where nothing else is said", function()
    start_own ""
    local own = broker.eventually(function() return seen().own end)
    for _ = 1, 20 do ok(channel:publish("held", { routing_key = own })) end
    broker.eventually(function() return seen().held == 16 end)
    ok(channel:publish("one", { routing_key = own }))
    assert.equal(16, seen().held)
    server:request "/let_go"
    broker.eventually(function() return seen().held == 20 and seen().one == 1 end)
  end)

  it("begins when what is set up before it has succeeded", function()
    start_own("", [[setup = function()
      if seen:get "let go" then return true end
      return nil, require "moonrabbit.errors".new { kind = "closed", message = "not set up yet" }
    end]])
    server:logged "consuming: not set up yet; trying again"
    server:request "/let_go"
    consumes()
    assert.equal(1, seen().asked)
  end)

  it("finishes what is being handled when it is reloaded, and loses nothing", function()
    start(1)
    for i = 1, 12 do send("held" .. i) end
    broker.eventually(function() return seen().running == 4 end)
    local old = server:reload()
    server:logged "gracefully shutting down"
    server:request "/let_go"
    nginx.gone(old, 15)
    broker.eventually(function() return count(answers) == 12 end)
    local all = answered()
    for i = 1, 12 do assert.equal(1, all["held" .. i .. "!"], server:log()) end
    for i = 1, 12 do assert.equal(1, seen()["held" .. i]) end
  end)

  it("takes again what a crashed worker had", function()
    start(1)
    for i = 1, 8 do send("held" .. i) end
    broker.eventually(function() return seen().running == 4 end)
    local pid = server:workers()[1]
    os.execute("kill -KILL " .. pid)
    nginx.gone { pid }
    server:request "/let_go"
    broker.eventually(function() return seen().done == 8 end)
    broker.eventually(function() return count(answers) == 8 end)
    local all, again = answered(), 0
    for i = 1, 8 do
      assert.equal(1, all["held" .. i .. "!"])
      again = again + seen()["held" .. i] - 1
    end
    assert.equal(4, again)
  end)
end)
