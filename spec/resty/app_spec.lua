-- Apps in the workers of nginx: the scripts that `moonrabbit run` runs.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cjson = require "cjson.safe"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

-- $name, $version and $exit are filled in.
local script = [[
local mr = require "moonrabbit"
local seen = ngx.shared.seen
local route = mr.route

local function note(what, msg)
  seen:incr(what .. ":" .. msg.body, 1, 0)
  seen:incr("worker:" .. ngx.worker.pid(), 1, 0)
  seen:incr("version:$version", 1, 0)
end

local function handle(msg)
  mr.sleep(0.005)
  note("done", msg)
end

local function flaky(msg)
  if seen:incr("tries:" .. msg.body, 1, 0) < 3 then error("not yet") end
  note("done", msg)
end

local function bad() error("always") end
local function asleep() mr.sleep(60) end
local function deaf(msg)
  ngx.sleep(2.5)
  note("late", msg)
end

local function held()
  seen:set("holding", true)
  while not seen:get "let go" do ngx.sleep(0.01) end
end

local function copy(msg, app)
  mr.sleep(0.2)
  note("done", msg)
  return app:publish(msg.body .. "!", { routing_key = "$name.out" })
end

return mr.app {
  name = "$name",
  exchanges = { ["$name"] = { type = "topic" } },
  queues = { ["$name.in"] = { bind = { { "$name", "#" } } }, ["$name.out"] = {} },
  consumers = {
    { queue = "$name.in", concurrency = 8, timeout = 1, prefetch = 50,
      retry = mr.retry.exponential { first = 0.2, factor = 1, attempts = 3, jitter = 0 },
      route = route.first {
        route.key("ok", handle),
        route.key("flaky", flaky),
        route.key("bad", bad),
        route.key("asleep", asleep),
        route.key("deaf", deaf),
        route.key("held", held),
        route.key("copy", copy),
        route.key("refused", route.dead_letter "nobody wants it"),
      } },
  },
}
]]

local with_store = [[
local mr = require "moonrabbit"
return mr.app {
  name = "$name.$store",
  queues = { ["$name.$store"] = {} },
  consumers = {
    { queue = "$name.$store", dedupe = mr.dedupe.$store $options,
      handler = function(msg)
        mr.sleep(0.02)
        ngx.shared.seen:incr("$store:" .. msg.body, 1, 0)
      end },
  },
}
]]

local http = [[
  lua_shared_dict seen 2m;
  lua_shared_dict keys 1m;
  init_by_lua_block {
    if io.open "$prefix/checked" then require "moonrabbit.resty".check_app "../$name.lua" end
  }
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    rabbit.start { uri = "$uri", reconnect = { first = 0.05, max = $max }, exit_timeout = $exit, $more }
    for word in ("$scripts"):gmatch "%S+" do rabbit.consume { app = word } end
  }
]]

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /let_go { content_by_lua_block { ngx.shared.seen:set("let go", true) } }
  location /seen {
    content_by_lua_block {
      local all = {}
      for _, key in ipairs(ngx.shared.seen:get_keys(0)) do all[key] = ngx.shared.seen:get(key) end
      all.apps = require "moonrabbit.resty".stats().apps
      ngx.say(require "cjson.safe".encode(all))
    }
  }
]]

describe("an app in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local conn, channel, server, line, name, files

  local function fill(text, values)
    return (text:gsub("%$(%l+)", function(key) return values[key] and tostring(values[key]) end))
  end

  -- Writes a script next to nginx's prefix.
  local function write(file, text, values)
    local path = nginx.here .. "/build/" .. file
    local handle = assert(io.open(path, "w"))
    handle:write((fill(text, values or {})))
    handle:close()
    files[path] = true
    return "../" .. file
  end

  local function write_app(version) return write(name .. ".lua", script, { name = name, version = version or 1 }) end

  local function seen() return cjson.decode((server:request "/seen") or "") or { apps = {} } end

  local function start(what)
    what = what or {}
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    server = nginx.start {
      workers = what.workers or 2, server = locations,
      http = fill(http, { name = name, scripts = what.scripts or write_app(), exit = what.exit or 5,
        max = what.max or 0.2, more = what.more or "",
        uri = broker.uri { host = "127.0.0.1", port = line.port } }),
    }
    server:ready "/ping"
    if what.runs ~= false then
      broker.eventually(function() return seen().apps[name] == "running" end, 20, "the app runs")
    end
  end

  before_each(function()
    files = {}
    name = broker.unique "app"
    conn = broker.connect()
    channel = ok(conn:channel { confirm = true })
  end)

  after_each(function()
    if server then server:stop() end
    if line then line:stop() end
    server, line = nil, nil
    for path in pairs(files) do os.remove(path) end
    for _, queue in ipairs { ".in", ".out", ".dead", ".shared", ".redis", ".memory", ".shared.dead", ".redis.dead",
      ".memory.dead" } do
      channel:queue_delete(name .. queue)
    end
    for _, exchange in ipairs { "", ".home", ".shared.home", ".redis.home", ".memory.home", ".orphans" } do
      channel:exchange_delete(name .. exchange)
    end
    broker.close_all()
  end)

  local function send(key, ...)
    for _, body in ipairs { ... } do ok(channel:publish(body, { exchange = name, routing_key = key })) end
  end

  local function count(what)
    local n, all = 0, seen()
    for key in pairs(all) do
      if key:find(what .. ":", 1, true) == 1 then n = n + 1 end
    end
    return n
  end

  local function next_of(queue)
    return broker.eventually(function() return channel:get(name .. queue, { no_ack = true }) end, 10, queue)
  end

  -- The next dead letter.
  local function parked()
    return broker.eventually(function() return channel:get(name .. ".dead", { no_ack = true }) end, 10, "a dead letter")
  end

  -- Publishes `key` messages until fn returns; gives their bodies.
  local function under_load(key, fn)
    local bodies, over, running = {}, false, true
    moonrabbit.run(function()
      moonrabbit.spawn(function()
        while not over do
          local body = "load" .. #bodies + 1
          send(key, body)
          bodies[#bodies + 1] = body
          moonrabbit.sleep(0.002)
        end
        running = false
      end)
      broker.eventually(function() return #bodies > 30 and count "done" > 5 end)
      fn()
      over = true
      broker.eventually(function() return not running end)
    end)
    return bodies
  end

  local function all_done(bodies)
    local missing
    local fine = pcall(broker.eventually, function()
      local all = seen()
      missing = {}
      for _, body in ipairs(bodies) do
        if not all["done:" .. body] then missing[#missing + 1] = body end
      end
      return #missing == 0
    end, 20)
    assert.truthy(fine, ("%d of %d missing: %s\n%s"):format(#missing, #bodies, table.concat(missing, " "),
      server:log()))
  end

  it("runs in every worker: routes, retries, parks what it cannot do", function()
    start()
    broker.eventually(function()
      return ok(channel:queue_declare(name .. ".in", { passive = true })).consumer_count == 2
    end, 20, "both workers consume")
    local bodies = {}
    for i = 1, 200 do
      bodies[i] = "m" .. i
      channel:publish_async(bodies[i], { exchange = name, routing_key = "ok" })
    end
    send("flaky", "flaky")
    all_done(bodies)
    all_done { "flaky" }
    assert.equal(3, seen()["tries:flaky"])
    assert.equal(2, count "worker")
    send("bad", "bad")
    local message = parked()
    assert.equal("bad", message.body)
    assert.matches("always", message.headers["moonrabbit-error"])
    send("elsewhere", "unroutable")
    message = parked()
    assert.equal("unroutable", message.body)
    assert.matches("no route", message.headers["moonrabbit-error"])
    send("refused", "refused")
    assert.equal("nobody wants it", parked().headers["moonrabbit-reason"])
    send("copy", "copy")
    assert.equal("copy!", next_of ".out".body)
    assert.is_nil(server:log():find "%[alert%]")
  end)

  it("ends handlers whose time is over, and leaves those that it cannot", function()
    start { workers = 1 }
    send("asleep", "asleep")
    local message = parked()
    assert.equal("asleep", message.body)
    assert.matches("1 s", message.headers["moonrabbit-error"])
    send("deaf", "deaf")
    assert.equal("deaf", parked().body)
    server:logged "a handler of '[^']+' has not returned within 1 s, and cannot be ended"
    broker.eventually(function() return seen()["late:deaf"] == 3 end, 10, "they end at last")
    send("ok", "after")
    all_done { "after" }
  end)

  it("a reload runs the new script, and loses nothing", function()
    start()
    local old
    local bodies = under_load("ok", function()
      write_app(2)
      old = server:reload()
      broker.eventually(function() return seen()["version:2"] end, 20, "the new script runs")
    end)
    all_done(bodies)
    nginx.gone(old, 10)
  end)

  it("a worker that is killed loses nothing", function()
    start()
    local bodies = under_load("ok", function()
      local pid = server:workers()[1]
      os.execute("kill -KILL " .. pid)
      broker.eventually(function() return not nginx.alive(pid) and #server:workers() == 2 end)
    end)
    all_done(bodies)
  end)

  it("lost connections and deleted queues: it comes back, and loses nothing", function()
    start()
    local bodies = under_load("ok", function()
      line:cut()
      moonrabbit.sleep(0.1)
      line:cut()
    end)
    all_done(bodies)
    -- Those may have been done before the last cut: a worker that does this one consumes again.
    send("ok", "between")
    all_done { "between" }
    ok(channel:queue_delete(name .. ".in"))
    server:logged "its queue was deleted[^\n]*trying again"
    broker.eventually(function() return channel:publish("back", { exchange = name, routing_key = "ok" }) end, 10)
    all_done { "back" }
  end)

  it("does not wait for handlers whose connection is lost", function()
    -- One without a time limit, which would end it as well.
    start { workers = 1, exit = 60, scripts = write(name .. ".lua", (script:gsub("timeout = 1, ", "")),
      { name = name, version = 1 }) }
    send("held", "held")
    broker.eventually(function() return seen().holding end)
    line:cut()
    send("ok", "after")
    all_done { "after" }
    server:request "/let_go"
  end)

  it("finishes what it has when the worker leaves", function()
    -- Without a time limit: a copy that takes longer would be made twice.
    start { workers = 1, scripts = write(name .. ".lua", (script:gsub("timeout = 1, ", "")),
      { name = name, version = 1 }) }
    for i = 1, 16 do send("copy", "c" .. i) end
    broker.eventually(function() return count "done" > 0 end)
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
    local taken, left = {}, ok(channel:queue_declare(name .. ".in", { passive = true })).message_count
    while true do
      local message = ok(channel:get(name .. ".out", { no_ack = true }))
      if not message then break end
      taken[message.body] = (taken[message.body] or 0) + 1
    end
    assert.equal(0, left)
    for i = 1, 16 do assert.equal(1, taken["c" .. i .. "!"]) end
  end)

  it("does not stay behind when the broker is silent", function()
    start { workers = 1, exit = 0.5 }
    send("ok", "before")
    all_done { "before" }
    line.silent = true
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
  end)

  it("does not stay behind when the broker falls silent before the connection that publishes is there", function()
    start { workers = 1, exit = 0.5, runs = false, more = [[connect_timeout = 60, timeout = 60, setup = function()
      while not ngx.shared.seen:get "let go" do ngx.sleep(0.01) end
      return true
    end]] }
    server:logged(name:gsub("%p", "%%%0") .. ", consuming: connected to")
    server:logged "publishing: connected to"
    local lines = #line.lines
    line.silent = true
    server:request "/let_go"
    broker.eventually(function() return #line.lines > lines end, 10, "the next connection begins")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 12)
  end)

  it("says what is wrong with a script, with its line, and goes on without it", function()
    local scripts = {
      write_app(),
      write(name .. "-syntax.lua", "local x = \n= 1"),
      write(name .. "-throws.lua", "local x\nlocal y = x.field\n"),
      write(name .. "-nothing.lua", "return 7"),
      write(name .. "-sql.lua", with_store, { name = name, store = "sql",
        options = '{ driver = "sqlite3", source = "x" }' }),
      "nowhere.lua",
    }
    start { workers = 1, scripts = table.concat(scripts, " ") }
    for _, text in ipairs {
      name:gsub("%p", "%%%0") .. "%-syntax.lua:2: ", name:gsub("%p", "%%%0") .. "%-throws.lua:2: ",
      "%-nothing.lua: the script returned a number, and no app", "dedupe.sql would block nginx's worker",
      "/nowhere.lua: there is no such file",
    } do
      server:logged("this worker runs without the app: [^\n]*" .. text)
    end
    send("ok", "one")
    all_done { "one" }
  end)

  it("is tried again as seldom as can be when the broker refuses it for good", function()
    ok(channel:exchange_declare(name, { type = "direct" }))
    start { workers = 1, max = 20, runs = false }
    local seconds = server:logged(name:gsub("%p", "%%%0") .. ", consuming: [^\n]*trying again in ([%d.]+) s")
    assert.truthy(tonumber(seconds) >= 15, seconds)
  end)

  it("begins when what is set up before it has succeeded", function()
    start { workers = 1, runs = false, more = [[setup = function()
      if ngx.shared.seen:get "let go" then return true end
      return nil, require "moonrabbit.errors".new { kind = "closed", message = "not set up yet" }
    end]] }
    server:logged(name:gsub("%p", "%%%0") .. ", consuming: not set up yet; trying again")
    server:request "/let_go"
    broker.eventually(function() return seen().apps[name] == "running" end, 20, "the app runs")
    send("ok", "one")
    all_done { "one" }
  end)

  it("begins though what a script brings has thrown", function()
    local path = write(name .. ".lua", [[
      local mr, attached = require "moonrabbit", 0
      local store = { commit = function() return true end, abort = function() return true end }
      function store.begin() return "new" end
      function store.attach()
        attached = attached + 1
        if attached == 2 then error "the store is not well" end
      end
      return mr.app { name = "$name", queues = { ["$name.in"] = {} }, consumers = {
        { queue = "$name.in", dedupe = store, handler = function() end } } }
    ]], { name = name })
    start { workers = 1, scripts = path }
    server:logged "starting it threw: [^\n]*the store is not well[^\n]*"
  end)

  it("says what holds within one worker only", function()
    local path = write(name .. ".lua", [[
      local mr = require "moonrabbit"
      return mr.app { name = "$name", queues = { ["$name.in"] = {} }, consumers = {
        { queue = "$name.in", order_by = function(msg) return msg.body end, handler = function() end } } }
    ]], { name = name })
    start { scripts = path }
    server:logged "order_by holds within a worker: with several, `partitions` keeps the order of a key"
    local _, lines = server:log():gsub("order_by holds within a worker", "")
    assert.equal(1, lines)
  end)

  it("check_app keeps a reload with a broken script from taking the place of what runs", function()
    start { workers = 1 }
    os.execute("touch " .. server.prefix .. "/checked")
    local pids = server:workers()
    write(name .. ".lua", "return mr.app {}")
    server:signal "HUP"
    server:logged "resty.check_app: [^\n]*lua:1: "
    assert.same(pids, server:workers())
    send("ok", "one")
    all_done { "one" }
    write_app(2)
    nginx.gone(server:reload(), 10)
    send("ok", "two")
    all_done { "two" }
    assert.truthy(seen()["version:2"])
  end)

  it("stores: shared and redis know what all workers have handled, memory says that it does not", function()
    local has_redis = nginx.shell "command -v redis-server" ~= "" and io.open "/usr/share/lua/5.1/nginx/redis.lua"
    local redis = has_redis and require("support.redis_server").start { password = "secret" }
    local scripts, stores = {}, { shared = '{ dict = "keys" }', memory = "{}" }
    if redis then stores.redis = ("{ url = %q }"):format(redis:url()) end
    for store, options in pairs(stores) do
      scripts[#scripts + 1] = write(("%s-%s.lua"):format(name, store), with_store,
        { name = name, store = store, options = options })
    end
    local fine, problem = pcall(function()
      start { scripts = table.concat(scripts, " "), runs = false }
      for store in pairs(stores) do
        broker.eventually(function() return seen().apps[name .. "." .. store] == "running" end, 20, store)
        for i = 1, 40 do
          ok(channel:publish_async("k" .. i % 10, { routing_key = name .. "." .. store, message_id = "k" .. i % 10 }))
        end
      end
      for store in pairs(stores) do
        local queue = name .. "." .. store
        broker.eventually(function()
          return count(store) == 10 and ok(channel:queue_declare(queue, { passive = true })).message_count == 0
        end, 15, store)
      end
      server:logged "dedupe.memory knows what its own worker has handled"
      for store in pairs(stores) do
        if store ~= "memory" then
          for i = 0, 9 do assert.equal(1, seen()[store .. ":k" .. i], store .. "\n" .. server:log()) end
        end
      end
    end)
    if redis then redis:stop() end
    assert(fine, problem)
  end)
end)
