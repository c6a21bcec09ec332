-- The resty runtime in a real nginx: in a folder and on a port of its own, ended by its pid.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local ok = broker.ok

local MODULES = "/usr/lib/nginx/modules"
local NGINX = os.getenv "NGINX" or "/usr/sbin/nginx"

local function readable(path)
  local file = io.open(path)
  if file then file:close() end
  return file ~= nil
end

local function shell(command)
  local pipe = io.popen(command)
  local output = pipe:read "*a"
  pipe:close()
  return (output:gsub("%s+$", ""))
end

describe("nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if not readable(NGINX) or not readable(MODULES .. "/ngx_http_lua_module.so") then
    pending "nginx with ngx_lua is not installed"
    return
  end

  local here = shell "pwd"
  local build = os.getenv "MOONRABBIT_BUILD" or "./build"
  if build:sub(1, 1) ~= "/" then build = here .. "/" .. build end
  local prefix, port, pid

  local function get(path, timeout)
    local transport = ok(native.open({ host = "127.0.0.1", port = port }, nil, 5))
    ok(transport:write("GET " .. path .. " HTTP/1.0\r\nHost: localhost\r\n\r\n"))
    local parts = {}
    while true do
      local bytes = transport:read(65536, timeout or 30)
      if not bytes then break end
      parts[#parts + 1] = bytes
    end
    transport:close()
    local response = table.concat(parts)
    return response:match "\r\n\r\n(.*)$", tonumber(response:match "^HTTP/%S+ (%d+)")
  end

  setup(function()
    prefix = here .. "/build/resty-" .. shell "mktemp -u XXXXXXXX"
    os.execute("mkdir -p " .. prefix .. "/logs " .. prefix .. "/tmp")
    local probe = assert(native.listen("127.0.0.1", 0))
    port = probe:port()
    probe:close()
    -- Workers of a master that runs as root would be another user, who may not read the checkout.
    local owner = shell "id -un" .. " " .. shell "id -gn"
    local locations = {}
    for _, name in ipairs { "work", "slow", "ping", "errors", "timer", "closed" } do
      locations[#locations + 1] =
        ("location /%s { content_by_lua_block { require('handlers').%s() } }"):format(name, name)
    end
    local file = assert(io.open(prefix .. "/nginx.conf", "w"))
    local configuration = ([[
load_module MODULES/ndk_http_module.so;
load_module MODULES/ngx_http_lua_module.so;
daemon on;
user OWNER;
worker_processes 1;
pid PREFIX/nginx.pid;
error_log PREFIX/logs/error.log info;
env AMQP_URL;
events { worker_connections 256; }
http {
  access_log off;
  lua_socket_log_errors off;
  client_body_temp_path PREFIX/tmp/body;
  proxy_temp_path PREFIX/tmp/proxy;
  fastcgi_temp_path PREFIX/tmp/fastcgi;
  uwsgi_temp_path PREFIX/tmp/uwsgi;
  scgi_temp_path PREFIX/tmp/scgi;
  lua_package_path 'HERE/lua/?.lua;HERE/lua/?/init.lua;HERE/spec/resty/?.lua;/usr/share/lua/5.1/?.lua;;';
  lua_package_cpath 'BUILD/5.1/?.so;;';
  server {
    listen 127.0.0.1:PORT;
    LOCATIONS
  }
}
]]):gsub("%u%u%u%u+", { MODULES = MODULES, PREFIX = prefix, HERE = here, BUILD = build, PORT = tostring(port),
      OWNER = owner,
      LOCATIONS = table.concat(locations, "\n    ") })
    file:write(configuration)
    file:close()
    local output = shell(("AMQP_URL='%s' '%s' -p '%s' -c '%s/nginx.conf' 2>&1"):format(broker.url, NGINX, prefix,
      prefix))
    local pid_file = io.open(prefix .. "/nginx.pid")
    assert(pid_file, "nginx did not start: " .. output)
    pid = tonumber((pid_file:read "*a"))
    pid_file:close()
    broker.eventually(function() return (get "/ping") == "pong\n" end, 10)
  end)

  teardown(function()
    if pid then
      os.execute("kill -QUIT " .. pid)
      local gone = pcall(broker.eventually, function()
        return shell("kill -0 " .. pid .. " 2>&1; echo $?"):match "(%d+)$" ~= "0"
      end, 8)
      if not gone then os.execute("kill -KILL " .. pid) end
    end
    if prefix and not os.getenv "KEEP" then os.execute("rm -rf '" .. prefix .. "'") end
  end)

  local function log()
    local file = io.open(prefix .. "/logs/error.log")
    local text = file:read "*a"
    file:close()
    return text
  end

  it("connects, publishes with confirms, consumes and closes", function()
    local body = get "/work"
    assert.equal("ok\n", body, log())
  end)

  it("serves others while a request waits", function()
    local slow
    moonrabbit.run(function()
      local started = native.now()
      moonrabbit.spawn(function() slow = get "/slow" end)
      moonrabbit.sleep(0.2)
      for _ = 1, 20 do assert((get "/ping") == "pong\n") end
      assert(native.now() - started < 0.9, "the pings were held up")
      broker.eventually(function() return slow end)
    end)
    assert.equal("ok\n", slow, log())
  end)

  it("keeps no request that the broker closed the connection of", function()
    local started = native.now()
    assert.equal("ok\n", (get "/closed"), log())
    assert.truthy(native.now() - started < 1.9, native.now() - started .. " s")
  end)

  it("works in a timer", function()
    assert.equal("ok\n", (get "/timer"), log())
  end)

  it("says what is wrong", function()
    local lines = {}
    for line in (get "/errors" or ""):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal("refused", lines[1], log())
    assert.equal("auth", lines[2])
    assert.equal("vhost", lines[3])
    assert.equal("protocol", lines[4])
    assert.matches("lua_ssl_trusted_certificate", lines[5])
    assert.matches("moonrabbit.resty", lines[6])
  end)

  it("leaves nothing running and no error in the log", function()
    for _ = 1, 5 do assert.equal("ok\n", (get "/work")) end
    assert.is_nil(log():find("%[error%].*lua"), log())
    assert.is_nil(log():find("%[alert%]"), log())
  end)
end)
