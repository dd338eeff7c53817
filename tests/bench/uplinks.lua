-- POSTs uplinks as fast as they are answered, or by a timetable; counts the answers by status.
--
-- wrk … -s uplinks.lua URL -- DEVICES KIND RATE
--   DEVICES  a file of lines "device_id key"; thread n is device n, and all its connections carry that key
--   KIND     telemetry, event, or named (telemetry with a message id)
--   RATE     0: closed loop. Otherwise uplinks per second of all threads together, sent by a timetable whatever the
--            answers do, as long as a connection is free; how late a request left is part of what is measured (`late`).
--
-- Prints one line "result {…}" with counts, seconds and latencies in microseconds.

local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } bench_time;
int clock_gettime(int clock, bench_time *now);
]]
local CLOCK_MONOTONIC = 1
local moment = ffi.new("bench_time")
local function now()
  ffi.C.clock_gettime(CLOCK_MONOTONIC, moment)
  return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
end

local threads = {}

function setup(thread)
  thread:set("number", #threads + 1)
  table.insert(threads, thread)
end

function init(args)
  local devices = {}
  for line in io.lines(args[1]) do
    local id, key = line:match("^(%S+) (%S+)$")
    table.insert(devices, { id = id, key = key })
  end
  local device = devices[(number - 1) % #devices + 1]
  kind = args[2]
  rate = tonumber(args[3]) / #devices
  wrk.method = "POST"
  path = "/api/v1/devices/" .. device.id .. "/uplink"
  wrk.headers["Authorization"] = "Bearer " .. device.key
  wrk.headers["Content-Type"] = "application/json"
  -- Values of different lengths, as sensors have.
  readings, ready = {}, {}
  for i, value in ipairs({ "21.5", "7.25", "-3.0625", "19.0", "100.5", "0.5", "22.75", "-11.5" }) do
    readings[i] = '"payload":{"env.temperature":' .. value .. "}}"
    ready[i] = wrk.format(nil, path, nil, '{"kind":"' .. kind .. '",' .. readings[i])
  end
  mark = string.format('{"kind":"telemetry","message_id":"%x-%d-', math.floor(now() * 1e6), number)
  sent, due, late = 0, nil, 0
  accepted, refused, other = 0, 0, 0
end

function request()
  sent = sent + 1
  if kind == "named" then
    return wrk.format(nil, path, nil, mark .. sent .. '",' .. readings[sent % 8 + 1])
  end
  return ready[sent % 8 + 1]
end

-- Milliseconds until the next request may leave. Only defined where a timetable is wanted: wrk asks if it exists.
local function timetable()
  local at = now()
  due = due and due + 1 / rate or at + number / rate / 16
  if due < at then
    late = math.max(late, at - due)
    return 0
  end
  return math.floor((due - at) * 1000 + 0.5)
end
if os.getenv("BENCH_TIMETABLE") then
  delay = timetable
end

function response(status)
  if status == 202 then
    accepted = accepted + 1
  elseif status == 429 or status == 503 then
    refused = refused + 1
  else
    other = other + 1
  end
end

function done(summary, latency)
  local sums = { accepted = 0, refused = 0, other = 0 }
  local latest = 0
  for _, thread in ipairs(threads) do
    for name in pairs(sums) do
      sums[name] = sums[name] + (thread:get(name) or 0)
    end
    latest = math.max(latest, thread:get("late") or 0)
  end
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format(
    'result {"accepted":%d,"refused":%d,"other":%d,"failed":%d,"seconds":%.6f,"p50":%.0f,"p90":%.0f,"p99":%.0f,"max":%.0f,"late":%.0f}\n',
    sums.accepted, sums.refused, sums.other, failed, summary.duration / 1e6,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max, latest * 1e6
  ))
end
